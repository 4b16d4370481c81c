/* socket(): an allow-list of {INET, INET6} x {(STREAM, TCP), (DGRAM, UDP)}, and the place where a socket gets its
 * owner. The kernel has resolved protocol 0 before this hook; other families never come here (see bpf/README.md). */

static __always_inline bool is_allowed_protocol(struct bpf_sock *ctx, u32 flags)
{
	if (ctx->type == WEIR_SOCK_STREAM && ctx->protocol == IPPROTO_TCP)
		return flags & WEIR_TCP;
	if (ctx->type == WEIR_SOCK_DGRAM && ctx->protocol == IPPROTO_UDP)
		return flags & WEIR_UDP;
	return false;
}

static __always_inline u8 judge_socket(struct bpf_sock *ctx, u32 flags)
{
	if (!(flags & (ctx->family == AF_INET ? WEIR_INET : WEIR_INET6)))
		return WEIR_REASON_FAMILY;
	return is_allowed_protocol(ctx, flags) ? WEIR_REASON_NONE : WEIR_REASON_PROTOCOL;
}

static __always_inline int errno_of(u8 reason)
{
	if (reason == WEIR_REASON_FAMILY)
		return EAFNOSUPPORT;
	return reason == WEIR_REASON_PROTOCOL ? EPROTONOSUPPORT : ENOMEM;
}

static __always_inline bool remember_owner(struct bpf_sock *ctx, u32 now, struct weir_identity *who)
{
	struct weir_socket *s = sockets.sk_storage_get(ctx, 0, BPF_SK_STORAGE_GET_F_CREATE);
	struct weir_counters *c = counters_of(who->slot);

	if (!s)
		return false;
	s->leaf = bpf_get_current_cgroup_id();
	s->container = who->container;
	s->created = now & ~WEIR_UNSETTLED;
	s->counted = 1;
	remember(s, now, who);
	if (c)
		add(&c->sockets_created, 1);
	return true;
}

/* The first socket of a cgroup below a managed parent. Without a spare slot, or room, it stays with its parent. */
static __always_inline struct weir_enrolled *enrol_child(struct weir_enrolled *parent, u64 *container, u32 now)
{
	struct weir_enrolled *enrolled, child = {.policy = parent->policy,
						 .flags = (parent->flags & ~WEIR_PARENT) | WEIR_BORN,
						 .since = now & ~WEIR_UNSETTLED};
	u64 leaf = bpf_get_current_cgroup_id();
	u32 slot;

	if (leaf == *container || spare.pop(&slot))
		return parent;
	child.slot = slot;
	/* insert() is BPF_NOEXIST: of two first sockets at once, one brings its slot back. */
	if (cgroups.insert(&leaf, &child))
		spare.push(&slot, 0);
	enrolled = cgroups.lookup(&leaf);
	if (!enrolled)
		return parent;
	*container = leaf;
	return enrolled;
}

int weir_sock_create(struct bpf_sock *ctx)
{
	struct weir_attempt what = {
		.protocol = ctx->protocol,
		.hook = WEIR_HOOK_SOCK_CREATE,
		.rule = WEIR_DEFAULT_RULE,
	};
	struct weir_enrolled *enrolled;
	struct weir_identity who;
	u32 now = generation();
	u64 container;

	enrolled = find_actor(&container);
	if (!enrolled)
		return 1;
	if (enrolled->flags & WEIR_PARENT)
		enrolled = enrol_child(enrolled, &container, now);
	identify(&who, container, enrolled);
	what.reason = judge_socket(ctx, who.flags);
	/* Without its owner a socket could not be told from one that was handed over: refused, audited or not. */
	if ((!what.reason || who.flags & WEIR_AUDIT) && !remember_owner(ctx, now, &who)) {
		what.reason = WEIR_REASON_MEMORY;
		who.flags &= ~WEIR_AUDIT;
	}
	return answer(conclude(&who, &what, true), errno_of(what.reason));
}

int weir_sock_release(struct bpf_sock *ctx)
{
	struct weir_socket *s = sockets.sk_storage_get(ctx, 0, 0);
	struct weir_enrolled *enrolled;
	struct weir_counters *c;
	u64 container;

	/* An accepted socket has its listener's memory; socket() has not counted it. */
	if (!s || !s->counted || (s->listener && ctx->state != WEIR_TCP_LISTEN))
		return 1;
	/* Not by the slot that the socket remembers: that may be another container's by now. */
	container = s->container;
	enrolled = cgroups.lookup(&container);
	if (!enrolled)
		return 1;
	c = counters_of(enrolled->slot);
	if (c)
		add(&c->sockets_released, 1);
	return 1;
}
