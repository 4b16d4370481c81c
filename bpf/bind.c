/* bind(): refused, or port 0 on a wildcard or loopback address, or anything. */

static __always_inline bool is_ephemeral(struct weir_address *at, u16 port)
{
	if (port)
		return false;
	normalise(at); /* the wildcard address becomes loopback */
	if (is_ipv4(at))
		return (bpf_ntohl(at->word[3]) >> 24) == 127;
	return !at->word[0] && !at->word[1] && !at->word[2] && at->word[3] == bpf_htonl(1);
}

static __always_inline int judge_bind(struct bpf_sock_addr *ctx, struct weir_address *at)
{
	struct weir_attempt what = {
		.to = at,
		.port = bpf_ntohs(ctx->user_port),
		.protocol = ctx->protocol,
		.hook = WEIR_HOOK_BIND,
		.rule = WEIR_DEFAULT_RULE,
	};
	struct weir_address asked = *at;
	struct weir_identity who;
	bool managed;

	what.reason = judge_user(ctx, sockets.sk_storage_get(ctx->sk, 0, 0), &who, &managed);
	if (!managed)
		return 1;
	if (!what.reason && !(who.flags & WEIR_BIND_ANY) &&
	    !(who.flags & WEIR_BIND_EPHEMERAL && is_ephemeral(&asked, what.port)))
		what.reason = WEIR_REASON_BIND;
	return answer(conclude(&who, &what, true), EACCES);
}

int weir_bind4(struct bpf_sock_addr *ctx)
{
	struct weir_address at;

	mapped(&at, ctx->user_ip4);
	return judge_bind(ctx, &at);
}

int weir_bind6(struct bpf_sock_addr *ctx)
{
	struct weir_address at = {{ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3]}};

	return judge_bind(ctx, &at);
}
