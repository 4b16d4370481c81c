<?php
// A TCP echo server, in the style of the PHP manual's chapter on sockets.
error_reporting(E_ALL & ~E_WARNING);
set_time_limit(0);

$address = '0.0.0.0';
$port = 10000;

function stop($step, $socket = null) {
    $code = $socket ? socket_last_error($socket) : socket_last_error();
    echo "$step() failed: ", socket_strerror($code), " ($code)\n";
    exit(1);
}

$server = socket_create(AF_INET, SOCK_STREAM, SOL_TCP);
if ($server === false) {
    stop('socket_create');
}
echo "socket_create() worked\n";

if (socket_bind($server, $address, $port) === false) {
    stop('socket_bind', $server);
}
echo "socket_bind() worked\n";

if (socket_listen($server, 5) === false) {
    stop('socket_listen', $server);
}
echo "socket_listen() worked\n";

while (($client = socket_accept($server)) !== false) {
    socket_write($client, "Type something; 'quit' ends it.\n");
    while (($line = socket_read($client, 2048, PHP_NORMAL_READ)) !== false) {
        $line = trim($line);
        if ($line === 'quit') {
            break;
        }
        socket_write($client, "You said: $line\n");
    }
    socket_close($client);
}
stop('socket_accept', $server);
