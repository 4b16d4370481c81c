/* An i386 program: socketcall(SYS_SOCKET, {AF_NETLINK, SOCK_RAW, 0}), then exit with the errno. Needs no C library.
 *
 *     gcc -m32 -static -nostdlib -ffreestanding seccomp_ia32.c */
#define NR_EXIT 1
#define NR_SOCKETCALL 102 /* asm/unistd_32.h */
#define SYS_SOCKET 1	  /* linux/net.h */

static int system_call(int number, int first, const void *second)
{
	int result;
	__asm__ volatile("int $0x80" : "=a"(result) : "a"(number), "b"(first), "c"(second) : "memory");
	return result;
}

void _start(void)
{
	static const int netlink[] = {16, 3, 0};
	int fd = system_call(NR_SOCKETCALL, SYS_SOCKET, netlink);
	system_call(NR_EXIT, fd < 0 ? -fd : 0, 0);
	__builtin_unreachable();
}
