/* What happens when something is refused: it is counted, reported, and answered. */

struct weir_attempt {
	const struct weir_address *to; /* or from; may be NULL */
	u16 port;		       /* host byte order */
	u8 protocol;
	u8 hook;
	u8 reason;
	u16 rule;
};

static __always_inline void count_refusal(struct weir_identity *who, const struct weir_attempt *what)
{
	struct weir_refusal key = {.policy = who->policy,
				   .slot = who->slot,
				   .rule = what->rule,
				   .hook = what->hook,
				   .reason = what->reason,
				   .audited = who->flags & WEIR_AUDIT};
	struct weir_counters *c;
	u64 zero = 0, *count = refusals.lookup(&key);

	if (!count) {
		/* insert() is BPF_NOEXIST: of two first refusals at once, neither may wipe out the other's. */
		refusals.insert(&key, &zero);
		count = refusals.lookup(&key);
	}
	if (count)
		return add(count, 1);
	c = counters_of(who->slot);
	if (c)
		add(&c->refusals_uncounted, 1);
}

/* A race between CPUs lets a few more through in a second; it is a limit on noise, not a rule. */
static __always_inline bool may_report(u32 slot)
{
	u64 second = bpf_ktime_get_ns() >> 30;
	struct weir_bucket *b = buckets.lookup(&slot);

	if (!b)
		return false;
	if (b->second != second) {
		b->second = second;
		b->events = 0;
	}
	if (b->events >= WEIR_EVENTS_PER_SECOND)
		return false;
	b->events++;
	return true;
}

/* `in_task`: the hook runs in the task that asked (bpf_get_current_comm is not to be had in packet programs). */
static __always_inline void report(struct weir_identity *who, const struct weir_attempt *what, bool in_task)
{
	struct weir_counters *c = counters_of(who->slot);
	struct weir_event *e;

	if (!may_report(who->slot)) {
		if (c)
			add(&c->events_suppressed, 1);
		return;
	}
	e = events.ringbuf_reserve(sizeof(*e));
	if (!e) {
		if (c)
			add(&c->events_lost, 1);
		return;
	}
	__builtin_memset(e, 0, sizeof(*e));
	e->time = bpf_ktime_get_ns();
	e->cgroup = who->container;
	e->slot = who->slot;
	e->policy = who->policy;
	e->hook = what->hook;
	e->reason = what->reason;
	e->rule = what->rule;
	e->protocol = what->protocol;
	e->port = what->port;
	e->audited = who->flags & WEIR_AUDIT;
	if (what->to)
		e->address = *what->to;
	if (in_task) {
		e->pid = bpf_get_current_pid_tgid() >> 32;
		bpf_get_current_comm(e->comm, sizeof(e->comm));
	}
	events.ringbuf_submit(e, 0);
}

/* The hook's answer to an attempt: 1 lets it pass (allowed, or audited), 0 refuses. Each program has one call of this,
 * at its end: it is large, and inlined. */
static __always_inline int conclude(struct weir_identity *who, const struct weir_attempt *what, bool in_task)
{
	if (what->reason == WEIR_REASON_NONE)
		return 1;
	count_refusal(who, what);
	report(who, what, in_task);
	return who->flags & WEIR_AUDIT;
}

/* The errno of a refused call: EPERM where the kernel has no bpf_set_retval for the hook (before 5.18). */
static __always_inline int answer(int verdict, int error)
{
#ifdef WEIR_SET_RETVAL
	if (!verdict)
		bpf_set_retval(-error);
#endif
	return verdict;
}

/* May the caller use this socket at all? *managed is cleared when no container has a say. Where both policies let
 * descriptors cross, the caller's policy judges the call and the owner's judges the packets. */
static __always_inline u8 judge_user(struct bpf_sock_addr *ctx, struct weir_socket *s, struct weir_identity *who,
				     bool *managed)
{
	struct weir_identity actor;
	int user = find_user(ctx->sk, s, who, &actor);
	u32 owner = who->flags;

	*managed = user != WEIR_USER_UNMANAGED;
	if (user == WEIR_USER_UNMANAGED || user == WEIR_USER_OWNER)
		return WEIR_REASON_NONE;
	if (user == WEIR_USER_OTHER) {
		*who = actor;
		if (owner & actor.flags & WEIR_TRANSFER)
			return WEIR_REASON_NONE;
		/* Charged to the container that tries; let pass only where both are audited. */
		who->flags &= owner | ~WEIR_AUDIT;
	}
	return WEIR_REASON_TRANSFER;
}
