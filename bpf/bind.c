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
	u16 port = bpf_ntohs(ctx->user_port);
	struct weir_attempt what = {.to = at, .port = port, .protocol = ctx->protocol, .hook = WEIR_HOOK_BIND,
				    .reason = WEIR_REASON_BIND, .rule = WEIR_DEFAULT_RULE};
	struct weir_identity who;
	struct weir_address asked = *at;
	int admitted;

	if (!ctx->sk)
		return 1;
	admitted = admit(ctx, sockets.sk_storage_get(ctx->sk, 0, 0), &what, &who);
	if (admitted != GO_ON)
		return admitted;
	if (who.flags & WEIR_BIND_ANY || (who.flags & WEIR_BIND_EPHEMERAL && is_ephemeral(&asked, port)))
		return 1;
	return answer(refuse(&who, &what, true), EACCES);
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
