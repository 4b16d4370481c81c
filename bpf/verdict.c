/* What does a policy version say of a destination? The match, and a per-CPU memory of it.
 *
 * Policy versions never change and their numbers are never used again, so a remembered verdict is never stale.
 *
 * The memory is per CPU, yet softirqs and preemption can put another program into the middle of a read or a write.
 * A read is good when no writer had begun at its end that had not ended at its start. A writer is alone when nobody
 * was inside before it began and `begun` grew by its own step only; else it leaves the memory as it is. Both need no
 * more than atomic adds: exchange and compare-and-exchange are not there before Linux 5.12. */

#define VERDICT(rule, destination, deny) ((u32)(rule) << 16 | (u32)(destination) << 8 | (deny))
#define VERDICT_DENY(v) ((u8)(v))
#define VERDICT_DESTINATION(v) ((v) >> 8 & 0xff)
#define VERDICT_RULE(v) ((v) >> 16)
#define NO_VERDICT VERDICT(WEIR_DEFAULT_RULE, WEIR_PUBLIC, 2) /* the policy version is not there: refused */

#define READ(x) (*(volatile typeof(x) *)&(x))
#define WRITE(x, value) (*(volatile typeof(x) *)&(x) = (value))

static __always_inline bool is_ipv4(const struct weir_address *a)
{
	return !a->word[0] && !a->word[1] && a->word[2] == bpf_htonl(0xffff);
}

static __always_inline void mapped(struct weir_address *a, u32 ipv4)
{
	a->word[0] = 0;
	a->word[1] = 0;
	a->word[2] = bpf_htonl(0xffff);
	a->word[3] = ipv4;
}

/* The zero address goes to this host (kernel: ip_route_output_key, ip6_route_output_flags). */
static __always_inline void normalise(struct weir_address *a)
{
	if (a->word[3] || a->word[0] || a->word[1])
		return;
	if (a->word[2] == bpf_htonl(0xffff))
		a->word[3] = bpf_htonl(0x7f000001);
	else if (!a->word[2])
		a->word[3] = bpf_htonl(1);
}

/* Replaces an address that carries an IPv4 address with the one it carries; false when it carries none. */
static __always_inline bool embedded(struct weir_address *a)
{
	u32 ipv4;

	if (a->word[0] == bpf_htonl(0x0064ff9b) && !a->word[1] && !a->word[2])
		ipv4 = a->word[3];
	else if ((a->word[0] & bpf_htonl(0xffff0000)) == bpf_htonl(0x20020000))
		ipv4 = bpf_htonl(bpf_ntohl(a->word[0]) << 16 | bpf_ntohl(a->word[1]) >> 16);
	else if (!a->word[0] && !a->word[1] && !a->word[2] && a->word[3] != bpf_htonl(1))
		ipv4 = a->word[3];
	else
		return false;
	mapped(a, ipv4);
	normalise(a);
	return true;
}

/* Two longest-prefix look-ups and no loop: the order of the rules was settled when the policy was compiled. */
static __always_inline u32 match(u32 policy, const struct weir_address *to, u16 port, u8 protocol)
{
	struct weir_prefix address = {.length = 128};
	struct weir_ports ports = {.length = 64, .protocol = protocol, .port = bpf_htons(port)};
	struct weir_entry *entry;
	struct weir_clause *clause;
	void *by_address, *by_port;

	__builtin_memcpy(address.address, to, sizeof(address.address));
	by_address = addresses.lookup(&policy);
	by_port = clauses.lookup(&policy);
	if (!by_address || !by_port)
		return NO_VERDICT;
	entry = bpf_map_lookup_elem(by_address, &address);
	if (!entry)
		return NO_VERDICT;
	ports.list = entry->list;
	clause = bpf_map_lookup_elem(by_port, &ports);
	if (!clause)
		return NO_VERDICT;
	return VERDICT(clause->rule, entry->destination, clause->deny);
}

/* `port` in host byte order. The verdict's destination class is that of the outer address. */
static __always_inline u32 decide(u32 policy, const struct weir_address *to, u16 port, u8 protocol)
{
	u64 high = (u64)to->word[0] << 32 | to->word[1], low = (u64)to->word[2] << 32 | to->word[3];
	u32 flow = (u32)protocol << 16 | port, verdict, inner, begun, ended;
	u32 index = ((high ^ low * 0x9e3779b97f4a7c15ULL ^ flow ^ policy << 20) * 0x9e3779b97f4a7c15ULL) >> 40;
	struct weir_address address = *to;
	struct weir_verdict *memory;

	index &= WEIR_VERDICTS - 1;
	memory = verdicts.lookup(&index);
	if (!memory)
		return NO_VERDICT;
	ended = READ(memory->ended);
	if (READ(memory->high) == high && READ(memory->low) == low && READ(memory->flow) == flow &&
	    READ(memory->policy) == policy) {
		verdict = READ(memory->verdict);
		if (READ(memory->begun) == ended)
			return verdict;
	}

	normalise(&address);
	verdict = match(policy, &address, port, protocol);
	if (!VERDICT_DENY(verdict) && embedded(&address)) {
		inner = match(policy, &address, port, protocol);
		if (VERDICT_DENY(inner))
			verdict = VERDICT(VERDICT_RULE(inner), VERDICT_DESTINATION(verdict), VERDICT_DENY(inner));
	}
	if (VERDICT_DENY(verdict) < 2) {
		begun = READ(memory->begun);
		if (begun != READ(memory->ended))
			return verdict;
		__sync_fetch_and_add(&memory->begun, 1);
		if (READ(memory->begun) == begun + 1) {
			WRITE(memory->policy, policy);
			WRITE(memory->high, high);
			WRITE(memory->low, low);
			WRITE(memory->flow, flow);
			WRITE(memory->verdict, verdict);
		}
		__sync_fetch_and_add(&memory->ended, 1);
	}
	return verdict;
}
