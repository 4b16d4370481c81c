/* The maps. The loader pins them, or puts those that are pinned in their place: state outlives it. */

#ifndef WEIR_MAX_CONTAINERS
#error "the loader defines WEIR_MAX_CONTAINERS"
#endif

BPF_TABLE("array", u32, struct weir_config, config, 1);
BPF_TABLE("hash", u64, struct weir_enrolled, cgroups, WEIR_MAX_CONTAINERS);
BPF_TABLE("percpu_array", u32, struct weir_counters, counters, WEIR_MAX_CONTAINERS);
BPF_TABLE("array", u32, struct weir_bucket, buckets, WEIR_MAX_CONTAINERS);
/* Slots for cgroups that are born without user space, and what user space remembers of each slot (the programs do not
 * read `slots` and `labels`): WEIR_SPARE, or the slot that its counts are added to (with WEIR_SUM: instead of all
 * others that are marked with that one), or 0. */
BPF_QUEUESTACK("queue", spare, u32, WEIR_MAX_SPARE, 0);
BPF_TABLE("array", u32, u32, slots, WEIR_MAX_CONTAINERS);
BPF_F_TABLE("hash", u64, struct weir_labels, labels, WEIR_MAX_CONTAINERS, BPF_F_NO_PREALLOC);
BPF_F_TABLE("sk_storage", int, struct weir_socket, sockets, 0, BPF_F_NO_PREALLOC | BPF_F_CLONE);
BPF_TABLE("percpu_array", u32, struct weir_verdict, verdicts, WEIR_VERDICTS);
BPF_TABLE("hash", struct weir_refusal, u64, refusals, WEIR_MAX_REFUSALS);
BPF_TABLE("lru_hash", struct weir_peer, u32, peers, WEIR_MAX_PEERS);

/* A policy version: user space makes the inner maps, of the shape of these. Without BTF, unlike BCC's own macros: from
 * 5.15 to 6.1 a map with BTF and one without never count as the same shape (timer_off, bpf_map_meta_equal). */
#define WEIR_INNER_MAP(type, key_type, leaf_type, name, entries, map_flags)                                            \
	struct name##_table_t {                                                                                        \
		key_type key;                                                                                          \
		leaf_type leaf;                                                                                        \
		u32 max_entries;                                                                                       \
		int flags;                                                                                             \
	};                                                                                                             \
	__attribute__((section("maps/" type))) struct name##_table_t name = {.flags = (map_flags),                     \
									     .max_entries = (entries)}

WEIR_INNER_MAP("lpm_trie", struct weir_prefix, struct weir_entry, one_addresses, 1, BPF_F_NO_PREALLOC);
WEIR_INNER_MAP("lpm_trie", struct weir_ports, struct weir_clause, one_clauses, 1, BPF_F_NO_PREALLOC);
BPF_TABLE("hash_of_maps$one_addresses", u32, u32, addresses, WEIR_MAX_POLICIES);
BPF_TABLE("hash_of_maps$one_clauses", u32, u32, clauses, WEIR_MAX_POLICIES);
BPF_TABLE("hash", u32, struct weir_policy, policies, WEIR_MAX_POLICIES);

/* As BCC's BPF_RINGBUF_OUTPUT, which counts in pages. */
struct events_table_t {
	int key;
	u32 leaf;
	int (*ringbuf_output)(void *, u64, u64);
	void *(*ringbuf_reserve)(u64);
	void (*ringbuf_discard)(void *, u64);
	void (*ringbuf_submit)(void *, u64);
	u64 (*ringbuf_query)(u64);
	u32 max_entries;
};
__attribute__((section("maps/ringbuf"))) struct events_table_t events = {
	.max_entries = WEIR_EVENTS_BYTES,
};

static __always_inline struct weir_counters *counters_of(u32 slot)
{
	return counters.lookup(&slot);
}

/* Programs can be interrupted on their own CPU (softirq, preemption): only an atomic add loses nothing. */
static __always_inline void add(u64 *counter, u64 value)
{
	__sync_fetch_and_add(counter, value);
}
