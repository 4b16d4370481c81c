/* connect() and sendmsg(): may this socket send to that destination?
 *
 * One decision under four thin entries. The kernel runs connect6 for a mapped address given to connect(), but sendmsg4
 * for one given to sendto(): the address decides what is IPv4, never the hook or the socket's family. */

static __always_inline u64 peer_hash(const struct weir_address *a, u16 port)
{
	u32 zero = 0;
	struct weir_config *c = config.lookup(&zero);
	u64 h = c ? c->secret : 0;

	h = (h ^ ((u64)a->word[0] << 32 | a->word[1])) * 0x9e3779b97f4a7c15ULL;
	h ^= h >> 32;
	h = (h ^ ((u64)a->word[2] << 32 | a->word[3])) * 0xc2b2ae3d27d4eb4fULL;
	h ^= h >> 29;
	return (h ^ port) * 0x9e3779b97f4a7c15ULL | 1;
}

static __always_inline struct weir_peer peer_of(u64 cookie, const struct weir_address *address, u16 port)
{
	struct weir_peer peer = {.cookie = cookie, .address = *address, .port = port};

	normalise(&peer.address);
	return peer;
}

/* Answers of this peer are expected. Recorded here and not at the packet: here the address is what the socket's
 * owner will see as the sender, before any NAT of its own network namespace. */
static __always_inline void expect_answers(struct bpf_sock_addr *ctx, struct weir_socket *s,
					   const struct weir_address *to, u16 port)
{
	u64 hash = peer_hash(to, port);
	struct weir_peer peer;
	u32 yes = 1;

	if (s && READ(s->peer) == hash)
		return;
	peer = peer_of(bpf_get_socket_cookie(ctx), to, port);
	if (!peers.lookup(&peer))
		peers.update(&peer, &yes);
	if (s)
		WRITE(s->peer, hash);
}

static __always_inline bool answers_a_peer(struct bpf_sock_addr *ctx, const struct weir_address *to, u16 port)
{
	struct weir_peer peer = peer_of(bpf_get_socket_cookie(ctx), to, port);

	return peers.lookup(&peer);
}

static __always_inline u8 judge_destination(struct bpf_sock_addr *ctx, struct weir_identity *who,
					    struct weir_attempt *what)
{
	u32 verdict = decide(who->policy, what->to, what->port, what->protocol);

	if (!VERDICT_DENY(verdict))
		return WEIR_REASON_NONE;
	if (what->protocol == IPPROTO_UDP && who->flags & WEIR_LISTEN && answers_a_peer(ctx, what->to, what->port))
		return WEIR_REASON_NONE;
	what->rule = VERDICT_RULE(verdict);
	return VERDICT_DENY(verdict) == 1 ? WEIR_REASON_RULE : WEIR_REASON_NO_POLICY;
}

static __always_inline int judge(struct bpf_sock_addr *ctx, u8 hook, const struct weir_address *to, bool to_given)
{
	struct weir_attempt what = {
		.to = to,
		.port = bpf_ntohs(ctx->user_port),
		.protocol = ctx->protocol,
		.hook = hook,
		.rule = WEIR_DEFAULT_RULE,
	};
	struct weir_identity who;
	struct weir_socket *s;
	bool managed;

	s = sockets.sk_storage_get(ctx->sk, 0, 0);
	what.reason = judge_user(ctx, s, &who, &managed);
	if (!managed)
		return 1;
	if (!what.reason && what.protocol != IPPROTO_TCP && what.protocol != IPPROTO_UDP)
		what.reason = WEIR_REASON_PROTOCOL;
	if (!what.reason && to_given)
		what.reason = judge_destination(ctx, &who, &what);
	if (!conclude(&who, &what, true))
		return answer(0, EACCES);
	if (s && hook == WEIR_HOOK_CONNECT)
		s->listener = 0;
	if (hook == WEIR_HOOK_SENDMSG && to_given && !(who.flags & WEIR_LISTEN))
		expect_answers(ctx, s, to, what.port);
	return 1;
}

static __always_inline int judge4(struct bpf_sock_addr *ctx, u8 hook)
{
	struct weir_address to;

	mapped(&to, ctx->user_ip4);
	/* sendmsg() on a connected socket with a control message and no address: judged at connect(). The family says
	 * nothing, AF_UNSPEC with an address is sent like AF_INET (udp_sendmsg). */
	return judge(ctx, hook, &to, ctx->user_ip4 || ctx->user_port || ctx->sk->state != WEIR_TCP_ESTABLISHED);
}

static __always_inline int judge6(struct bpf_sock_addr *ctx, u8 hook)
{
	struct weir_address to = {{ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3]}};

	return judge(ctx, hook, &to,
		     to.word[0] | to.word[1] | to.word[2] | to.word[3] || ctx->user_port ||
			     ctx->sk->state != WEIR_TCP_ESTABLISHED);
}

int weir_connect4(struct bpf_sock_addr *ctx)
{
	return judge4(ctx, WEIR_HOOK_CONNECT);
}

int weir_connect6(struct bpf_sock_addr *ctx)
{
	return judge6(ctx, WEIR_HOOK_CONNECT);
}

int weir_sendmsg4(struct bpf_sock_addr *ctx)
{
	return judge4(ctx, WEIR_HOOK_SENDMSG);
}

int weir_sendmsg6(struct bpf_sock_addr *ctx)
{
	return judge6(ctx, WEIR_HOOK_SENDMSG);
}
