/* Makes the system calls named on standard input, one a line, and prints what each answered: 0 or an errno.
 *
 *     native socket 2 1 0        a name below, or a number; then up to six arguments, each a number of 64 bits
 *     int80 359 16 3 0           the 32-bit entry of x86_64, by i386's numbers
 *     x32 socket 2 1 0           the same number with the x32 bit
 *
 * A descriptor that a call returns is the next free one and is closed at the next "reset" line. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define X32_BIT 0x40000000L /* __X32_SYSCALL_BIT, asm/unistd.h */
#define LAST_DESCRIPTOR 64

static const struct {
	const char *name;
	long number;
} calls[] = {
	{"socket", SYS_socket},
	{"socketpair", SYS_socketpair},
	{"bind", SYS_bind},
	{"listen", SYS_listen},
	{"accept", SYS_accept},
	{"accept4", SYS_accept4},
	{"connect", SYS_connect},
	{"getppid", SYS_getppid},
	{"io_uring_setup", SYS_io_uring_setup},
	{"io_uring_enter", SYS_io_uring_enter},
	{"io_uring_register", SYS_io_uring_register},
	{"pidfd_open", SYS_pidfd_open},
	{"pidfd_getfd", SYS_pidfd_getfd},
	{"ptrace", SYS_ptrace},
	{"add_key", SYS_add_key},
	{"request_key", SYS_request_key},
	{"keyctl", SYS_keyctl},
};

static long number_of(const char *word)
{
	for (unsigned i = 0; i < sizeof(calls) / sizeof(calls[0]); i++)
		if (!strcmp(word, calls[i].name))
			return calls[i].number;
	return strtol(word, NULL, 0);
}

static long int80(long number, const unsigned long *a)
{
#ifdef __x86_64__
	long result;
	__asm__ volatile("int $0x80"
			 : "=a"(result)
			 : "a"(number), "b"(a[0]), "c"(a[1]), "d"(a[2]), "S"(a[3]), "D"(a[4])
			 : "memory", "r8", "r9", "r10", "r11");
	return result;
#else
	(void)number;
	(void)a;
	fputs("int80 needs x86_64\n", stderr);
	exit(2);
#endif
}

static long answer(const char *mode, const char *name, const unsigned long *a)
{
	if (!strcmp(mode, "int80"))
		return int80(number_of(name), a);
	long number = number_of(name) | (strcmp(mode, "x32") ? 0 : X32_BIT);
	long result = syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]);
	return result < 0 ? -errno : result;
}

int main(void)
{
	char line[256];

	while (fgets(line, sizeof(line), stdin)) {
		char *mode = strtok(line, " \n"), *name = strtok(NULL, " \n"), *word;
		unsigned long a[6] = {0};

		if (!mode || !strcmp(mode, "reset")) {
			for (int fd = 3; fd < LAST_DESCRIPTOR; fd++)
				close(fd);
			continue;
		}
		for (int i = 0; i < 6 && (word = strtok(NULL, " \n")); i++)
			a[i] = strtoul(word, NULL, 0);
		long result = answer(mode, name, a);
		printf("%ld\n", result < 0 ? -result : 0);
		fflush(stdout);
	}
	return 0;
}
