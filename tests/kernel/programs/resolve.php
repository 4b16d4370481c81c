<?php // Resolves argv[1], connects to its port 80, starts a child process: prints one line for each.
$addresses = gethostbynamel($argv[1]) or exit("gethostbynamel failed\n");
echo "resolved ", implode(" ", $addresses), "\n";
$socket = socket_create(AF_INET, SOCK_STREAM, SOL_TCP) or exit("socket_create failed\n");
socket_connect($socket, $addresses[0], 80) or exit("socket_connect failed\n");
socket_write($socket, "HEAD / HTTP/1.0\r\n\r\n");
echo "connected ", substr(socket_read($socket, 512), 0, 12), "\n";
echo exec("echo child"), "\n";
