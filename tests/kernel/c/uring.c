/* One operation by io_uring, by the raw interface: what it answers, as a number on standard output.
 *
 *   uring [sqpoll] socket FAMILY TYPE PROTOCOL
 *   uring [sqpoll] connect|bind ADDRESS PORT      a TCP socket
 *   uring [sqpoll] send ADDRESS PORT              one datagram, SENDMSG with an address
 *   uring [sqpoll] listen                         on a TCP socket without an address; prints the port as well, and
 *                                                 listens until standard input ends
 *
 * 0 or a negative errno; 1000 when the kernel has no io_uring to give, 1001 when it lacks the operation (EINVAL).
 */
#include <arpa/inet.h>
#include <errno.h>
#include <linux/io_uring.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

/* linux/io_uring.h of older headers: these came with 5.19 and 6.11. */
#define OP_SOCKET 45
#define OP_BIND 56
#define OP_LISTEN 57

static struct io_uring_params params;
static int ring;
static char *sq, *cq;
static struct io_uring_sqe *sqes;

static void *map(unsigned long size, unsigned long offset)
{
	return mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring, (long)offset);
}

static int submit(void)
{
	unsigned *sq_tail = (unsigned *)(sq + params.sq_off.tail), *sq_flags = (unsigned *)(sq + params.sq_off.flags);
	unsigned *cq_head = (unsigned *)(cq + params.cq_off.head), *cq_tail = (unsigned *)(cq + params.cq_off.tail);
	unsigned flags = IORING_ENTER_GETEVENTS;

	((unsigned *)(sq + params.sq_off.array))[0] = 0;
	__atomic_store_n(sq_tail, *sq_tail + 1, __ATOMIC_RELEASE);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (*sq_flags & IORING_SQ_NEED_WAKEUP)
		flags |= IORING_ENTER_SQ_WAKEUP;
	while (__atomic_load_n(cq_tail, __ATOMIC_ACQUIRE) == *cq_head)
		if (syscall(SYS_io_uring_enter, ring, 1, 1, flags, NULL, 0) < 0 && errno != EINTR)
			return -errno;
	return ((struct io_uring_cqe *)(cq + params.cq_off.cqes))[*cq_head].res;
}

static socklen_t address(struct sockaddr_storage *to, const char *text, const char *port)
{
	struct sockaddr_in *v4 = (void *)to;
	struct sockaddr_in6 *v6 = (void *)to;

	if (inet_pton(AF_INET, text, &v4->sin_addr) == 1) {
		v4->sin_family = AF_INET;
		v4->sin_port = htons((unsigned short)atoi(port));
		return sizeof(*v4);
	}
	inet_pton(AF_INET6, text, &v6->sin6_addr);
	v6->sin6_family = AF_INET6;
	v6->sin6_port = htons((unsigned short)atoi(port));
	return sizeof(*v6);
}

int main(int argc, char **argv)
{
	struct sockaddr_storage to = {0};
	struct iovec data = {.iov_base = "x", .iov_len = 1};
	struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_name = &to};
	const char *what;
	socklen_t size = 0;
	int result;

	if (argc > 1 && !strcmp(argv[1], "sqpoll")) {
		params.flags = IORING_SETUP_SQPOLL;
		params.sq_thread_idle = 100;
		argv++, argc--;
	}
	if (argc < 2)
		return 2;
	what = argv[1];
	ring = (int)syscall(SYS_io_uring_setup, 4, &params);
	if (ring < 0)
		return printf("1000\n") < 0;
	sq = map(params.sq_off.array + params.sq_entries * 4, IORING_OFF_SQ_RING);
	cq = map(params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe), IORING_OFF_CQ_RING);
	sqes = map(params.sq_entries * sizeof(*sqes), IORING_OFF_SQES);
	if (argc > 3)
		size = address(&to, argv[2], argv[3]);

	if (!strcmp(what, "socket")) {
		sqes[0].opcode = OP_SOCKET;
		sqes[0].fd = atoi(argv[2]);
		sqes[0].off = (unsigned)atoi(argv[3]);
		sqes[0].len = (unsigned)atoi(argv[4]);
	} else if (!strcmp(what, "send")) {
		message.msg_namelen = size;
		sqes[0].opcode = IORING_OP_SENDMSG;
		sqes[0].fd = socket(to.ss_family, SOCK_DGRAM, 0);
		sqes[0].addr = (unsigned long)&message;
		sqes[0].len = 1;
	} else {
		sqes[0].opcode = !strcmp(what, "connect") ? IORING_OP_CONNECT : !strcmp(what, "bind") ? OP_BIND : OP_LISTEN;
		sqes[0].fd = socket(size ? to.ss_family : AF_INET, SOCK_STREAM, 0);
		sqes[0].addr = size ? (unsigned long)&to : 0;
		if (size)
			sqes[0].off = size;
		else
			sqes[0].len = 8;
	}
	result = submit();
	if (result == -EINVAL && sqes[0].opcode > IORING_OP_SENDMSG)
		result = 1001;
	printf("%d", result > 0 && result < 1000 ? 0 : result);
	if (!strcmp(what, "listen")) {
		socklen_t length = sizeof(to);

		getsockname(sqes[0].fd, (void *)&to, &length);
		printf(" %d", ntohs(((struct sockaddr_in *)&to)->sin_port));
	}
	printf("\n");
	fflush(stdout);
	return strcmp(what, "listen") ? 0 : getchar() != EOF;
}
