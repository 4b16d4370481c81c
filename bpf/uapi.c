/* The kernel's words that the programs use. No kernel-internal header is included: see kernel-stub/. */
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include <asm-generic/errno.h>

#define AF_INET 2
#define AF_INET6 10

/* include/net/tcp_states.h, the same since 2.6; bpf_sock.state has them. */
#define WEIR_TCP_ESTABLISHED 1
#define WEIR_TCP_SYN_SENT 2
#define WEIR_TCP_LISTEN 10

/* include/linux/net.h */
#define WEIR_SOCK_STREAM 1
#define WEIR_SOCK_DGRAM 2

#define WEIR_LO 1 /* LOOPBACK_IFINDEX, include/net/flow.h: lo is 1 in every network namespace */
