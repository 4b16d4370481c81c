/* The client: client WHAT CPU PROCS NETNS PEER-NETNS ADDRESS OPERATIONS
 *
 * The client enters the cgroup whose cgroup.procs is PROCS and the network namespace NETNS before it makes a socket;
 * its server stays in the cgroup of whoever started it, in PEER-NETNS. Both run on one core, so that what an operation
 * costs is the CPU time of the two: time that other processes take from the core does not count.
 * For each line of input it does so many OPERATIONS and prints one line: nanoseconds for one operation.
 *
 * WHAT: udp        64 bytes by sendto() on an unconnected socket
 *       connected  64 bytes by send() on a connected one
 *       scattered  64 bytes by sendto(), each to the next of 65,536 addresses
 *       connect    TCP socket, connect and close. The server takes and closes the connections after a batch: nothing is
 *                  woken up meanwhile.
 *       stream     64 KiB by send() on a TCP connection; the server reads and discards
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

enum { DATAGRAM = 64, CHUNK = 65536, BACKLOG = 4096 };

static char buffer[CHUNK];

static long cpu_time(void)
{
	struct timespec t;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
	return t.tv_sec * 1000000000L + t.tv_nsec;
}

static void must(int ok, const char *what)
{
	if (!ok)
		err(1, "%s", what);
}

static void enter_network(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	must(fd >= 0 && !setns(fd, CLONE_NEWNET), path);
	close(fd);
}

static void enter_cgroup(const char *procs)
{
	int fd = open(procs, O_WRONLY | O_CLOEXEC);

	must(fd >= 0 && write(fd, "0", 1) == 1, procs);
	close(fd);
}

static void stay_on(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	must(!sched_setaffinity(0, sizeof(set), &set), "sched_setaffinity");
}

static int open_socket(int type)
{
	int fd = socket(AF_INET, type | SOCK_CLOEXEC, 0);

	must(fd >= 0, "socket");
	return fd;
}

/* For each number on `orders`: take so many connections, read each to its end, close it; answer with the CPU time. */
static void serve(int orders, int answers)
{
	struct sockaddr_in any = {.sin_family = AF_INET, };
	socklen_t size = sizeof(any);
	int listener = open_socket(SOCK_STREAM), fd;
	long count, before, spent;

	must(!bind(listener, (struct sockaddr *)&any, sizeof(any)) && !listen(listener, BACKLOG), "listen");
	must(!getsockname(listener, (struct sockaddr *)&any, &size), "getsockname");
	must(write(answers, &any.sin_port, sizeof(any.sin_port)) == sizeof(any.sin_port), "answer");
	while (read(orders, &count, sizeof(count)) == sizeof(count)) {
		before = cpu_time();
		while (count--) {
			must((fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC)) >= 0, "accept");
			while (recv(fd, buffer, CHUNK, MSG_TRUNC) > 0)
				;
			close(fd);
		}
		spent = cpu_time() - before;
		must(write(answers, &spent, sizeof(spent)) == sizeof(spent), "answer");
	}
	exit(0);
}

static int to_server, from_server;

/* Returns its port, in network byte order. */
static in_port_t start_server(const char *network)
{
	int orders[2], answers[2];
	in_port_t port;

	must(!pipe2(orders, O_CLOEXEC) && !pipe2(answers, O_CLOEXEC), "pipe");
	if (!fork()) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		enter_network(network);
		close(orders[1]);
		serve(orders[0], answers[1]);
	}
	close(orders[0]);
	close(answers[1]);
	to_server = orders[1];
	from_server = answers[0];
	must(read(from_server, &port, sizeof(port)) == sizeof(port), "the server did not start");
	return port;
}

static void order(long connections)
{
	must(write(to_server, &connections, sizeof(connections)) == sizeof(connections), "order");
}

static long server_time(void)
{
	long spent;

	must(read(from_server, &spent, sizeof(spent)) == sizeof(spent), "the server's answer");
	return spent;
}

static long datagrams(const char *what, struct sockaddr_in to, long operations)
{
	static int fd = -1;
	static unsigned int turn;
	int connected = !strcmp(what, "connected"), scattered = !strcmp(what, "scattered");
	in_addr_t first = to.sin_addr.s_addr;
	long begun, i;

	if (fd < 0) {
		fd = open_socket(SOCK_DGRAM);
		must(!connected || !connect(fd, (struct sockaddr *)&to, sizeof(to)), "connect");
	}
	begun = cpu_time();
	for (i = 0; i < operations; i++) {
		if (scattered)
			to.sin_addr.s_addr = first ^ htonl(turn++ & 0xffff);
		if (connected)
			must(send(fd, buffer, DATAGRAM, 0) == DATAGRAM, "send");
		else
			must(sendto(fd, buffer, DATAGRAM, 0, (struct sockaddr *)&to, sizeof(to)) == DATAGRAM, "sendto");
	}
	return cpu_time() - begun;
}

static long connects(struct sockaddr_in to, long operations)
{
	long begun = cpu_time(), i;
	int fd;

	for (i = 0; i < operations; i++) {
		fd = open_socket(SOCK_STREAM);
		must(!connect(fd, (struct sockaddr *)&to, sizeof(to)), "connect");
		close(fd);
	}
	begun = cpu_time() - begun;
	order(operations);
	return begun + server_time();
}

static long stream(struct sockaddr_in to, long operations)
{
	int fd = open_socket(SOCK_STREAM);
	long begun, i;

	must(!connect(fd, (struct sockaddr *)&to, sizeof(to)), "connect");
	order(1);
	begun = cpu_time();
	for (i = 0; i < operations; i++)
		must(send(fd, buffer, CHUNK, 0) == CHUNK, "send");
	shutdown(fd, SHUT_WR);
	must(!read(fd, buffer, 1), "the stream's end");
	close(fd);
	return cpu_time() - begun + server_time();
}

int main(int argc, char **argv)
{
	struct sockaddr_in to = {.sin_family = AF_INET};
	long operations, spent;
	char line[16];

	if (argc != 8)
		errx(2, "give WHAT CPU PROCS NETNS PEER-NETNS ADDRESS OPERATIONS");
	must(inet_pton(AF_INET, argv[6], &to.sin_addr) == 1, argv[6]);
	operations = atol(argv[7]);
	stay_on(atoi(argv[2]));
	to.sin_port = start_server(argv[5]);
	enter_cgroup(argv[3]);
	enter_network(argv[4]);
	while (fgets(line, sizeof(line), stdin)) {
		if (!strcmp(argv[1], "connect"))
			spent = connects(to, operations);
		else if (!strcmp(argv[1], "stream"))
			spent = stream(to, operations);
		else
			spent = datagrams(argv[1], to, operations);
		printf("%.1f\n", (double)spent / operations);
		fflush(stdout);
	}
	return 0;
}
