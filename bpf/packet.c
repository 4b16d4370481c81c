/* Reads a packet at the cgroup_skb hooks, where data starts at the IP header, after routing and NAT. */

struct weir_packet {
	struct weir_address source;
	struct weir_address destination;
	u16 source_port;
	u16 destination_port;
	u8 protocol;
	u8 tcp_flags;
	u32 headers; /* bytes of IP and TCP or UDP headers that each segment repeats */
	u32 unsent;  /* bytes of a header that never reaches the wire */
};

#define TCP_SYN 0x02
#define TCP_ACK 0x10

static __always_inline bool read_ports(struct weir_packet *p, void *header, void *end)
{
	struct tcphdr *tcp = header;
	struct udphdr *udp = header;

	if ((void *)(udp + 1) > end)
		return false;
	p->source_port = bpf_ntohs(udp->source);
	p->destination_port = bpf_ntohs(udp->dest);
	p->tcp_flags = 0;
	if (p->protocol == IPPROTO_UDP) {
		p->headers += sizeof(*udp);
		return true;
	}
	if ((void *)(tcp + 1) > end)
		return false;
	p->tcp_flags = ((u8 *)tcp)[13];
	p->headers += tcp->doff * 4;
	return true;
}

/* IPv4 options choose another first hop (LSRR, SSRR); a later fragment has no port to judge. */
static __always_inline bool read_ipv4(struct weir_packet *p, void *data, void *end)
{
	struct iphdr *ip = data;

	if ((void *)(ip + 1) > end || ip->ihl != 5 || ip->frag_off & bpf_htons(0x3fff))
		return false;
	p->protocol = ip->protocol;
	mapped(&p->source, ip->saddr);
	mapped(&p->destination, ip->daddr);
	p->headers = sizeof(*ip);
	if (p->protocol != IPPROTO_TCP && p->protocol != IPPROTO_UDP)
		return true;
	return read_ports(p, ip + 1, end);
}

/* Extension headers carry routes (43) and hide ports. The one exception is what the kernel itself puts before a TCP
 * super-packet over 64 KiB (BIG TCP, ip6_xmit until Linux 7.0): hop-by-hop with nothing but a jumbo length, taken off
 * again before the wire. */
static __always_inline bool read_ipv6(struct weir_packet *p, void *data, void *end, u32 segments)
{
	struct ipv6hdr *ip = data;
	u8 *next = (void *)(ip + 1);

	if ((void *)(ip + 1) > end)
		return false;
	p->protocol = ip->nexthdr;
	__builtin_memcpy(&p->source, &ip->saddr, 16);
	__builtin_memcpy(&p->destination, &ip->daddr, 16);
	p->headers = sizeof(*ip);
	if (p->protocol == IPPROTO_HOPOPTS && segments > 1 && !ip->payload_len) {
		if ((void *)(next + 8) > end || next[0] != IPPROTO_TCP || next[1] || next[2] != 194 || next[3] != 4)
			return false;
		p->protocol = IPPROTO_TCP;
		p->unsent = 8;
		next += 8;
	}
	if (p->protocol == IPPROTO_TCP || p->protocol == IPPROTO_UDP)
		return read_ports(p, next, end);
	return p->protocol != IPPROTO_HOPOPTS && p->protocol != IPPROTO_ROUTING && p->protocol != IPPROTO_FRAGMENT &&
	       p->protocol != IPPROTO_DSTOPTS;
}

static __always_inline bool read_packet(struct __sk_buff *skb, struct weir_packet *p)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;

	p->unsent = 0;
	if (skb->protocol == bpf_htons(ETH_P_IP))
		return read_ipv4(p, data, end);
	if (skb->protocol == bpf_htons(ETH_P_IPV6))
		return read_ipv6(p, data, end, skb->gso_segs);
	return false;
}
