/* Socket calls of the 32-bit interface, from a 64-bit x86 program: int $0x80, socketcall(). Its pointers have 32 bits, so
 * what they point to is static and the program must be linked with -no-pie.
 *
 *   ia32_calls connect|bind|sendto A.B.C.D PORT     prints 0 or a negative errno
 *   ia32_calls socket FAMILY TYPE PROTOCOL
 */
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NR_SOCKETCALL 102 /* asm/unistd_32.h */
enum { SOCKET = 1, BIND = 2, CONNECT = 3, SENDTO = 11 }; /* linux/net.h */

static unsigned arguments[6];
static struct sockaddr_in to;
static char data[1];

static unsigned low(const void *pointer)
{
	return (unsigned)(unsigned long)pointer;
}

static int socketcall(int call)
{
	long result;

	__asm__ volatile("int $0x80" : "=a"(result) : "a"(NR_SOCKETCALL), "b"(call), "c"(low(arguments)) : "memory", "r8", "r9", "r10", "r11");
	return (int)result;
}

static int make(unsigned family, unsigned type, unsigned protocol)
{
	arguments[0] = family;
	arguments[1] = type;
	arguments[2] = protocol;
	return socketcall(SOCKET);
}

int main(int argc, char **argv)
{
	int result;

	if (argc == 5) {
		result = make((unsigned)atoi(argv[2]), (unsigned)atoi(argv[3]), (unsigned)atoi(argv[4]));
		return printf("%d\n", result < 0 ? result : 0) < 0;
	}
	if (argc != 4)
		return 2;
	to.sin_family = AF_INET;
	to.sin_port = htons((unsigned short)atoi(argv[3]));
	inet_pton(AF_INET, argv[2], &to.sin_addr);
	arguments[0] = (unsigned)make(AF_INET, strcmp(argv[1], "sendto") ? SOCK_STREAM : SOCK_DGRAM, 0);
	arguments[1] = low(&to);
	arguments[2] = sizeof(to);
	if (!strcmp(argv[1], "sendto")) {
		arguments[1] = low(data);
		arguments[2] = sizeof(data);
		arguments[3] = 0;
		arguments[4] = low(&to);
		arguments[5] = sizeof(to);
		result = socketcall(SENDTO);
	} else {
		result = socketcall(strcmp(argv[1], "bind") ? CONNECT : BIND);
	}
	return printf("%d\n", result < 0 ? result : 0) < 0;
}
