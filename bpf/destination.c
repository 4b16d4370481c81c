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

/* Answers of this peer are expected. Recorded here and not at the packet: here the address is what the socket's
 * owner will see as the sender, before any NAT of its own network namespace. */
static __always_inline void expect_answers(struct bpf_sock_addr *ctx, struct weir_socket *s,
					   const struct weir_address *to, u16 port)
{
	struct weir_peer peer = {};
	u64 hash = peer_hash(to, port);
	u32 yes = 1;

	if (s && READ(s->peer) == hash)
		return;
	peer.cookie = bpf_get_socket_cookie(ctx);
	peer.address = *to;
	normalise(&peer.address);
	peer.port = port;
	peers.update(&peer, &yes);
	if (s)
		WRITE(s->peer, hash);
}

static __always_inline bool answers_a_peer(struct bpf_sock_addr *ctx, const struct weir_address *to, u16 port)
{
	struct weir_peer peer = {};

	peer.cookie = bpf_get_socket_cookie(ctx);
	peer.address = *to;
	peer.port = port;
	return peers.lookup(&peer);
}

static __always_inline int judge(struct bpf_sock_addr *ctx, u8 hook, const struct weir_address *to, bool to_given)
{
	u16 port = bpf_ntohs(ctx->user_port);
	struct weir_attempt what = {.to = to, .port = port, .protocol = ctx->protocol, .hook = hook,
				    .rule = WEIR_DEFAULT_RULE};
	struct weir_identity who;
	struct weir_socket *s;
	u32 verdict;
	int admitted;

	if (!ctx->sk)
		return 1;
	s = sockets.sk_storage_get(ctx->sk, 0, 0);
	admitted = admit(ctx, s, &what, &who);
	if (admitted != GO_ON)
		return admitted;
	if (ctx->protocol != IPPROTO_TCP && ctx->protocol != IPPROTO_UDP) {
		what.reason = WEIR_REASON_PROTOCOL;
		return answer(refuse(&who, &what, true), EACCES);
	}
	if (!to_given)
		return 1;
	verdict = decide(who.policy, to, port, ctx->protocol);
	if (VERDICT_DENY(verdict)) {
		if (ctx->protocol == IPPROTO_UDP && who.flags & WEIR_LISTEN && answers_a_peer(ctx, to, port))
			return 1;
		what.reason = VERDICT_DENY(verdict) == 1 ? WEIR_REASON_RULE : WEIR_REASON_NO_POLICY;
		what.rule = VERDICT_RULE(verdict);
		if (!answer(refuse(&who, &what, true), EACCES))
			return 0;
	}
	if (s && hook == WEIR_HOOK_CONNECT)
		s->listener = 0;
	if (hook == WEIR_HOOK_SENDMSG && !(who.flags & WEIR_LISTEN))
		expect_answers(ctx, s, to, port);
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
