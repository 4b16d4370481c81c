/* Resolves argv[1], connects to its port 80, starts a child process: prints one line for each. For glibc and musl. */
#include <arpa/inet.h>
#include <netdb.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_ADDRCONFIG}, *list;
	int error = argc == 2 ? getaddrinfo(argv[1], "80", &hints, &list) : EAI_NONAME;

	if (error) {
		printf("getaddrinfo: %s\n", gai_strerror(error));
		return 1;
	}
	for (struct addrinfo *a = list; a; a = a->ai_next) {
		char text[64], reply[32] = "";
		if (a->ai_family != AF_INET)
			continue;
		getnameinfo(a->ai_addr, a->ai_addrlen, text, sizeof(text), NULL, 0, NI_NUMERICHOST);
		printf("resolved %s\n", text);
		int fd = socket(a->ai_family, a->ai_socktype, a->ai_protocol);
		if (connect(fd, a->ai_addr, a->ai_addrlen) || write(fd, "GET / HTTP/1.0\r\n\r\n", 18) != 18 ||
		    read(fd, reply, sizeof(reply) - 1) <= 0) {
			perror("connect");
			return 1;
		}
		printf("connected %.12s\n", reply);
	}
	FILE *child = popen("echo child", "r");
	char line[16] = "";
	printf("%s", child && fgets(line, sizeof(line), child) ? line : "no child\n");
	return 0;
}
