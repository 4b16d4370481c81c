/* The contract between the programs here and agent/kernel/abi.py: layouts, limits and the matching rules in words.
 *
 * Who is judged. Key of everything is the cgroup v2 id. A socket belongs to its *owner*, the nearest enrolled ancestor
 * of the cgroup that made it; a call is made by an *actor*, the nearest enrolled ancestor of the calling task's cgroup.
 * Enrolment gives a cgroup a slot (index of its counters), a policy version and the policy's flags, in one element of
 * the map `cgroups`, so a switch of policy is one map write. What a socket remembers of its owner is good only for the
 * generation it was read in: user space sets WEIR_UNSETTLED in `config.generation`, under which nothing remembered is
 * good, writes its entries, and then raises the generation. Killed half-way it leaves every call to look up what is in
 * force, which is slower and right.
 *   A cgroup below an entry with WEIR_PARENT gets an entry of its own with its first socket: the parent's policy, and a
 * slot from the queue `spare`, so that its bytes are its own from the first on, whether anybody looks or not.
 *
 * What a policy version is. It never changes once a cgroup uses it.
 *   addresses[policy]  longest-prefix match of the destination -> its list of clauses, its destination class
 *   clauses[policy]    longest-prefix match of (list, protocol, port) -> the rule that decides, allow or deny
 * The rules' order is settled by the compiler: for each prefix that occurs, the rules whose prefixes contain it make a
 * list; the list's protocols and port ranges are cut into pieces that one rule each decides, and the pieces into
 * prefixes of the port's 16 bits. Both matches always find something: ::/0 is there, and each list covers all ports.
 *   Example: rules {deny tcp 25}, {allow 10.1.0.0/16}, default deny give
 *     ::/0                -> list 0: (tcp, 25/16) deny rule 0, (tcp, 0/0) deny default, (udp, 0/0) deny default
 *     ::ffff:10.1.0.0/112 -> list 1: (tcp, 25/16) deny rule 0, (tcp, 0/0) allow rule 1, (udp, 0/0) allow rule 1
 *   so 10.1.2.3:25 is refused by rule 0 and 10.1.2.3:80 allowed by rule 1.
 * IPv4 lives as ::ffff:a.b.c.d. 0.0.0.0 is judged as 127.0.0.1 and :: as ::1, which is where the kernel sends them.
 * An IPv6 address that carries an IPv4 address (NAT64 64:ff9b::/96, 6to4 2002::/16, IPv4-compatible ::/96) must pass
 * twice: as it is, and as the address it carries.
 */
#ifndef WEIR_ABI_H
#define WEIR_ABI_H

/* Raised when a layout or the meaning of a pinned map changes: pins of another number are not adopted. */
#define WEIR_ABI 2

#define WEIR_MAX_RULES 512    /* rules of one policy */
#define WEIR_MAX_POLICIES 256 /* policy versions at one time */
#define WEIR_MAX_LEVEL 31     /* deepest cgroup level that can be enrolled: bounds the walk to the nearest ancestor */
#define WEIR_MAX_REFUSALS 16384
#define WEIR_MAX_PEERS 65536
#define WEIR_VERDICTS 512 /* per CPU, 40 bytes each; a power of two */
#define WEIR_EVENTS_BYTES 262144
#define WEIR_EVENTS_PER_SECOND 100 /* per container; the counters never depend on events */
#define WEIR_DEFAULT_RULE 0xffff
#define WEIR_UNSETTLED 0x80000000u /* in `config.generation`, see above */
#define WEIR_MAX_SPARE 1024	   /* slots that wait for cgroups not born yet */
#define WEIR_SPARE 0xffffffffu	   /* in `slots`: given to the queue `spare` */
#define WEIR_SUM 0x80000000u	   /* in `slots`: has the counts of all others that are marked with the same slot */
#define WEIR_LABELS 1024	   /* bytes of a cgroup's names, the closing zero included */
#define WEIR_NAME 64		   /* bytes of a policy's or rule's name, the closing zero included */

enum weir_hook {
	WEIR_HOOK_SOCK_CREATE = 1,
	WEIR_HOOK_CONNECT = 2,
	WEIR_HOOK_SENDMSG = 3,
	WEIR_HOOK_BIND = 4,
	WEIR_HOOK_EGRESS = 5,
	WEIR_HOOK_INGRESS = 6,
};

enum weir_reason {
	WEIR_REASON_NONE = 0,
	WEIR_REASON_RULE = 1,		  /* a rule of the policy, or its default, denies the destination */
	WEIR_REASON_NO_POLICY = 2,	  /* the cgroup is enrolled, but its policy version is not in the kernel */
	WEIR_REASON_FAMILY = 3,		  /* socket() of a family outside the policy */
	WEIR_REASON_PROTOCOL = 4,	  /* neither TCP nor UDP, or one that the policy leaves out */
	WEIR_REASON_BIND = 5,		  /* bind() to an address or port that the policy refuses */
	WEIR_REASON_TRANSFER = 6,	  /* the socket was made in another container */
	WEIR_REASON_LISTEN = 7,		  /* a packet to or from a listening socket */
	WEIR_REASON_UNSOLICITED = 8,	  /* a datagram from a peer that the socket has not sent to */
	WEIR_REASON_SIMULTANEOUS = 9,	  /* a SYN to a socket that is itself connecting */
	WEIR_REASON_HEADER = 10,	  /* IPv4 options, IPv6 extension headers, fragments, or no header to read */
	WEIR_REASON_LOOPBACK_DEVICE = 11, /* a loopback address on another device than lo */
	WEIR_REASON_MEMORY = 12,	  /* no memory to remember the socket's owner */
};

enum weir_destination {
	WEIR_PUBLIC = 0,
	WEIR_PRIVATE = 1,
	WEIR_LOOPBACK = 2,
	WEIR_DESTINATIONS = 3,
};

/* Flags of a policy, and of the way a cgroup was enrolled. */
#define WEIR_AUDIT 0x0001  /* count and report, refuse nothing */
#define WEIR_LISTEN 0x0002 /* listening and unsolicited datagrams are allowed */
#define WEIR_BIND_ANY 0x0004
#define WEIR_BIND_EPHEMERAL 0x0008 /* port 0 on a wildcard or loopback address */
#define WEIR_TRANSFER 0x0010	   /* sockets made in another container may be used */
#define WEIR_INET 0x0020
#define WEIR_INET6 0x0040
#define WEIR_TCP 0x0080
#define WEIR_UDP 0x0100
/* Parts of a policy that no layer enforces yet; the programs do not read these. */
#define WEIR_WANTS_NAMES 0x0200
#define WEIR_WANTS_OPTIONS 0x0400
#define WEIR_WANTS_IDLE 0x0800
#define WEIR_PARENT 0x2000 /* cgroups below get entries of their own */
#define WEIR_RUN 0x4000	   /* made by `weir run`; the programs do not read it */
#define WEIR_BORN 0x8000   /* enrolled before its first process: it can have no socket of unknown origin */

/* An IPv6 address, or IPv4 as ::ffff:a.b.c.d; network byte order. */
struct weir_address {
	__u32 word[4];
};

struct weir_config {
	__u32 abi;
	__u32 generation;
	__u64 secret;	   /* random for each load: keys the hash of UDP peers */
	__u64 build;	   /* first bytes of the SHA-256 of the programs' text; written when all links run them */
	__u32 next_policy; /* numbers of policy versions are never used again */
	__u32 has_retval;  /* the programs choose the errno of a refusal (bpf_set_retval, Linux 5.18) */
};

struct weir_enrolled {
	__u32 policy;
	__u16 slot; /* 1 .. WEIR_MAX_CONTAINERS - 1 */
	__u16 flags;
	__u32 since; /* generation of the enrolment */
	__u32 pad;
};

/* What a socket remembers (sk_storage). The words written after creation carry the generation in their upper half, so
 * that a torn pair of words is never taken for a fresh one. */
struct weir_socket {
	__u64 leaf;	 /* cgroup that made the socket */
	__u64 container; /* the nearest enrolled ancestor at that moment */
	__u64 owner;	 /* generation << 32 | slot << 16 | flags */
	__u64 policy;	 /* generation << 32 | policy */
	__u64 peer;	 /* hash of the last UDP destination */
	__u32 created;	 /* generation */
	__u16 listener;	 /* 1: listens, or was accepted by a socket that does */
	__u16 counted;	 /* 1: among sockets_created (and copied to what a listener accepts) */
};

struct weir_prefix {
	__u32 length;
	__u8 address[16];
};

struct weir_entry {
	__u32 list;
	__u32 destination;
};

struct weir_ports {
	__u32 length; /* 48 + the bits of the port that matter */
	__u32 list;
	__u8 protocol;
	__u8 pad;
	__u16 port; /* network byte order */
};

struct weir_clause {
	__u16 rule;
	__u16 deny;
};

/* What a cgroup is called, as JSON; for people and for the next agent. The programs do not read it. */
struct weir_labels {
	char text[WEIR_LABELS];
};

/* Says which version this is; for people and for the next agent. The programs do not read it. */
struct weir_policy {
	char name[WEIR_NAME];
	__u8 sha256[32];
	__u32 flags;
	__u32 rules;
};

struct weir_rule {
	char name[WEIR_NAME];
	__u32 line;
	__u32 deny;
};

struct weir_counters {
	__u64 bytes[WEIR_DESTINATIONS];
	__u64 packets[WEIR_DESTINATIONS];
	__u64 sockets_created;
	__u64 sockets_released;
	__u64 sockets_adopted;	  /* of unknown origin, judged as the container's own */
	__u64 events_suppressed;  /* over WEIR_EVENTS_PER_SECOND */
	__u64 events_lost;	  /* no room in the ring buffer */
	__u64 refusals_uncounted; /* no room in `refusals` */
};

struct weir_refusal {
	__u32 policy;
	__u16 slot;
	__u16 rule;
	__u8 hook;
	__u8 reason;
	__u8 audited;
	__u8 pad;
};

struct weir_bucket {
	__u64 second;
	__u64 events;
};

struct weir_peer {
	__u64 cookie;
	struct weir_address address;
	__u32 port;
	__u32 pad;
};

/* A verdict remembered, per CPU. `begun` and `ended` count the writers, see verdict.c. */
struct weir_verdict {
	__u32 begun;
	__u32 ended;
	__u64 high;
	__u64 low;
	__u32 flow; /* protocol << 16 | port */
	__u32 policy;
	__u32 verdict; /* rule << 16 | destination << 8 | deny */
	__u32 pad;
};

struct weir_event {
	__u64 time; /* CLOCK_MONOTONIC, ns */
	__u64 cgroup;
	__u32 pid; /* 0 where the hook does not know: packets */
	__u32 policy;
	struct weir_address address;
	__u16 port;
	__u16 rule;
	__u16 slot;
	__u8 hook;
	__u8 reason;
	__u8 protocol;
	__u8 audited;
	__u8 pad[6];
	char comm[16];
};

#endif
