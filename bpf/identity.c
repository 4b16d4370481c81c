/* Which container is it? The nearest enrolled ancestor, of a task or of a socket. */

struct weir_identity {
	u32 slot;
	u32 flags;
	u32 policy;
	u64 container; /* cgroup id */
};

static __always_inline void identify(struct weir_identity *who, u64 container, struct weir_enrolled *enrolled)
{
	who->slot = enrolled->slot;
	who->flags = enrolled->flags;
	who->policy = enrolled->policy;
	who->container = container;
}

static __always_inline u32 generation(void)
{
	u32 zero = 0;
	struct weir_config *c = config.lookup(&zero);

	return c ? *(volatile u32 *)&c->generation : 0;
}

/* The calling task's container, or NULL: not managed. An ordinary container is its own leaf: one look-up. */
static __always_inline struct weir_enrolled *find_actor(u64 *container)
{
	struct weir_enrolled *enrolled;
	u64 id = bpf_get_current_cgroup_id();
	int level;

	*container = id;
	enrolled = cgroups.lookup(&id);
	if (enrolled)
		return enrolled;
#pragma clang loop unroll(disable)
	for (level = WEIR_MAX_LEVEL; level >= 0; level--) {
		id = bpf_get_current_ancestor_cgroup_id(level);
		if (!id)
			continue;
		*container = id;
		enrolled = cgroups.lookup(&id);
		if (enrolled)
			return enrolled;
	}
	return NULL;
}

/* The container of the socket that a packet belongs to. Never the current task's: in softirq that is anybody's. */
static __always_inline struct weir_enrolled *find_owner_of_packet(struct __sk_buff *skb, u64 *container)
{
	struct weir_enrolled *enrolled;
	u64 id = bpf_skb_cgroup_id(skb);
	int level;

	*container = id;
	enrolled = cgroups.lookup(&id);
	if (enrolled)
		return enrolled;
#pragma clang loop unroll(disable)
	for (level = WEIR_MAX_LEVEL; level >= 0; level--) {
		id = bpf_skb_ancestor_cgroup_id(skb, level);
		if (!id)
			continue;
		*container = id;
		enrolled = cgroups.lookup(&id);
		if (enrolled)
			return enrolled;
	}
	return NULL;
}

/* While the generation is unsettled it writes 0, which no generation is: nothing read now may be recalled later. */
static __always_inline void remember(struct weir_socket *s, u32 now, struct weir_identity *who)
{
	u64 high = now & WEIR_UNSETTLED ? 0 : (u64)now << 32;

	*(volatile u64 *)&s->owner = high | who->slot << 16 | who->flags;
	*(volatile u64 *)&s->policy = high | who->policy;
}

/* True when what the socket remembers of its owner was read in this generation. */
static __always_inline bool recall(struct weir_socket *s, u32 now, struct weir_identity *who)
{
	u64 owner = *(volatile u64 *)&s->owner;
	u64 policy = *(volatile u64 *)&s->policy;

	if (owner >> 32 != now || policy >> 32 != now)
		return false;
	who->slot = (u32)owner >> 16;
	who->flags = owner & 0xffff;
	who->policy = (u32)policy;
	who->container = s->container;
	return true;
}

static __always_inline bool is_ancestor_of_current(u64 cgroup)
{
	int level;

#pragma clang loop unroll(disable)
	for (level = WEIR_MAX_LEVEL; level >= 0; level--)
		if (bpf_get_current_ancestor_cgroup_id(level) == cgroup)
			return true;
	return false;
}

enum weir_user {
	WEIR_USER_UNMANAGED, /* no container has a say */
	WEIR_USER_OWNER,     /* *who is the socket's owner */
	WEIR_USER_OTHER,     /* a transferred descriptor: *who is the owner, *actor the container that uses it */
	WEIR_USER_UNKNOWN,   /* made outside every managed cgroup, in the hands of a container enrolled at birth */
};

/* Who owns the socket of this call, and is it the caller? `s` may be NULL (made before enrolment, or outside). */
static __always_inline int find_user(struct bpf_sock *sk, struct weir_socket *s, struct weir_identity *who,
				     struct weir_identity *actor)
{
	u32 now = generation();
	struct weir_enrolled *caller, *owner = NULL;
	struct weir_counters *c;
	u64 caller_id, owner_id = 0;

	if (s && recall(s, now, who) && s->leaf == bpf_get_current_cgroup_id())
		return WEIR_USER_OWNER;

	caller = find_actor(&caller_id);
	if (s) {
		/* The leaf first: a container enrolled after its parent, and after this socket was made. */
		owner_id = s->leaf;
		owner = cgroups.lookup(&owner_id);
		if (!owner) {
			owner_id = s->container;
			owner = cgroups.lookup(&owner_id);
		}
	}
	if (owner) {
		identify(who, owner_id, owner);
		/* No enrolled caller: a kernel thread (MPTCP), or a process outside that was given the socket. */
		if (!caller || caller->slot == owner->slot) {
			s->container = owner_id;
			remember(s, now, who);
			return WEIR_USER_OWNER;
		}
		identify(actor, caller_id, caller);
		/* Made under the parent before the caller's own cgroup was enrolled: the caller's. */
		if ((s32)(s->created - caller->since) >= 0 || !is_ancestor_of_current(owner_id))
			return WEIR_USER_OTHER;
	}
	if (!caller)
		return WEIR_USER_UNMANAGED;
	identify(who, caller_id, caller);
	if (!owner && who->flags & WEIR_BORN)
		return WEIR_USER_UNKNOWN;
	if (!s)
		s = sockets.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (s) {
		s->leaf = bpf_get_current_cgroup_id();
		s->container = caller_id;
		s->created = now & ~WEIR_UNSETTLED;
		remember(s, now, who);
	}
	c = counters_of(who->slot);
	if (c)
		add(&c->sockets_adopted, 1);
	return WEIR_USER_OWNER;
}
