/* Packets: the last word on where they go, the count of what leaves, and what may come in.
 *
 * A refusal here is silent for TCP (the connection hangs), so connect() must have refused first; this layer stops what
 * connect() and sendmsg() cannot see: routes inside headers, NAT, sockets older than the enrolment, revoked flows. */

/* Whose packet? False: not managed. `s` may be NULL: no memory for it, then each packet takes the long way. */
static __always_inline bool find_owner(struct __sk_buff *skb, struct bpf_sock *sk, struct weir_socket **found,
				       struct weir_identity *who)
{
	u32 now = generation();
	struct weir_enrolled *enrolled;
	struct weir_socket *s = NULL;
	u64 container;

	if (sk)
		s = sockets.sk_storage_get(sk, 0, 0);
	*found = s;
	if (s && recall(s, now, who))
		return true;
	enrolled = find_owner_of_packet(skb, &container);
	if (!enrolled)
		return false;
	identify(who, container, enrolled);
	if (!s && sk) {
		s = sockets.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
		if (s) {
			s->leaf = bpf_skb_cgroup_id(skb);
			s->created = now & ~WEIR_UNSETTLED;
		}
		*found = s;
	}
	if (s) {
		s->container = container;
		remember(s, now, who);
	}
	return true;
}

/* IP bytes as they leave on the wire: every segment of a super-packet repeats the headers. */
static __always_inline void account(struct __sk_buff *skb, struct weir_identity *who, struct weir_packet *p,
				    u32 destination)
{
	u32 segments = skb->gso_segs ?: 1;
	struct weir_counters *c = counters_of(who->slot);

	if (!c || destination >= WEIR_DESTINATIONS)
		return;
	add(&c->bytes[destination], skb->len - p->unsent + (u64)(segments - 1) * p->headers);
	add(&c->packets[destination], segments);
}

/* A reply of a socket that listens, or was accepted from one, is no new destination. */
static __always_inline bool is_reply(struct bpf_sock *sk, struct weir_socket *s, struct weir_identity *who)
{
	return who->flags & WEIR_LISTEN && (sk->state == WEIR_TCP_LISTEN || (s && s->listener));
}

/* Has this UDP socket sent to that address (listen: deny), or heard from it (listen: allow)? */
static __always_inline bool is_peer(struct __sk_buff *skb, const struct weir_address *address, u16 port)
{
	struct weir_peer peer = peer_of(bpf_get_socket_cookie(skb), address, port);

	return peers.lookup(&peer);
}

static __always_inline u8 judge_egress(struct __sk_buff *skb, struct weir_identity *who, struct weir_attempt *what,
				       struct weir_packet *p, struct bpf_sock *sk, struct weir_socket *s,
				       u32 *destination)
{
	u32 verdict;

	if (!read_packet(skb, p))
		return WEIR_REASON_HEADER;
	what->to = &p->destination;
	what->protocol = p->protocol;
	if (p->protocol != IPPROTO_TCP && p->protocol != IPPROTO_UDP)
		return WEIR_REASON_PROTOCOL;
	what->port = p->destination_port;
	verdict = decide(who->policy, &p->destination, what->port, p->protocol);
	*destination = VERDICT_DESTINATION(verdict);
	if (*destination == WEIR_LOOPBACK && skb->ifindex != WEIR_LO)
		return WEIR_REASON_LOOPBACK_DEVICE;
	if (sk && sk->state == WEIR_TCP_LISTEN && !(who->flags & WEIR_LISTEN))
		return WEIR_REASON_LISTEN;
	if (!VERDICT_DENY(verdict))
		return WEIR_REASON_NONE;
	if (sk && p->protocol == IPPROTO_TCP && is_reply(sk, s, who))
		return WEIR_REASON_NONE;
	if (p->protocol == IPPROTO_UDP && who->flags & WEIR_LISTEN && is_peer(skb, &p->destination, what->port))
		return WEIR_REASON_NONE;
	what->rule = VERDICT_RULE(verdict);
	return VERDICT_DENY(verdict) == 1 ? WEIR_REASON_RULE : WEIR_REASON_NO_POLICY;
}

int weir_egress(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk ? bpf_sk_fullsock(skb->sk) : NULL;
	struct weir_attempt what = {.hook = WEIR_HOOK_EGRESS, .rule = WEIR_DEFAULT_RULE};
	u32 destination = WEIR_PUBLIC;
	struct weir_identity who;
	struct weir_packet p = {};
	struct weir_socket *s;

	if (!find_owner(skb, sk, &s, &who))
		return 1;
	what.reason = judge_egress(skb, &who, &what, &p, sk, s, &destination);
	if (!conclude(&who, &what, false))
		return 0;
	account(skb, &who, &p, skb->ifindex == WEIR_LO ? WEIR_LOOPBACK : destination);
	return 1;
}

/* A socket that listens, or is itself connecting, and a segment for it. */
static __always_inline u8 judge_handshake(struct bpf_sock *sk, struct weir_socket *s, struct weir_identity *who,
					  struct weir_packet *p, bool readable)
{
	if (who->flags & WEIR_LISTEN) {
		if (s && sk->state == WEIR_TCP_LISTEN)
			s->listener = 1;
		return WEIR_REASON_NONE;
	}
	if (sk->state == WEIR_TCP_LISTEN)
		return WEIR_REASON_LISTEN;
	/* Extension headers would hide the flags: what connects expects a plain SYN-ACK or RST. */
	if (!readable || (p->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN)
		return WEIR_REASON_SIMULTANEOUS;
	return WEIR_REASON_NONE;
}

/* A datagram for a socket without a peer. */
static __always_inline u8 judge_datagram(struct __sk_buff *skb, struct weir_socket *s, struct weir_identity *who,
					 struct weir_packet *p, bool readable)
{
	struct weir_peer peer;
	u32 yes = 1;

	if (!readable)
		return who->flags & WEIR_LISTEN ? WEIR_REASON_NONE : WEIR_REASON_HEADER;
	if (!(who->flags & WEIR_LISTEN) && s && READ(s->peer) == peer_hash(&p->source, p->source_port))
		return WEIR_REASON_NONE;
	if (is_peer(skb, &p->source, p->source_port))
		return WEIR_REASON_NONE;
	if (!(who->flags & WEIR_LISTEN))
		return WEIR_REASON_UNSOLICITED;
	peer = peer_of(bpf_get_socket_cookie(skb), &p->source, p->source_port);
	peers.update(&peer, &yes);
	return WEIR_REASON_NONE;
}

/* Only a socket's state tells what may come in: listening, connecting, or a datagram socket without a peer. */
int weir_ingress(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk ? bpf_sk_fullsock(skb->sk) : NULL;
	struct weir_attempt what = {.hook = WEIR_HOOK_INGRESS, .rule = WEIR_DEFAULT_RULE};
	struct weir_identity who;
	struct weir_packet p = {};
	struct weir_socket *s;
	bool readable;

	if (!sk)
		return 1;
	what.protocol = sk->protocol;
	if (what.protocol == IPPROTO_TCP ? sk->state != WEIR_TCP_LISTEN && sk->state != WEIR_TCP_SYN_SENT
					 : what.protocol != IPPROTO_UDP || sk->state == WEIR_TCP_ESTABLISHED)
		return 1;
	if (!find_owner(skb, sk, &s, &who))
		return 1;
	readable = read_packet(skb, &p);
	if (readable) {
		what.to = &p.source;
		what.port = p.source_port;
	}
	what.reason = what.protocol == IPPROTO_TCP ? judge_handshake(sk, s, &who, &p, readable)
						   : judge_datagram(skb, s, &who, &p, readable);
	return conclude(&who, &what, false);
}
