<?php
// A small HTTP client, in the style of the PHP manual's chapter on sockets. php http_client.php ADDRESS
error_reporting(E_ALL & ~E_WARNING);

$address = $argv[1];

$socket = socket_create(AF_INET, SOCK_STREAM, SOL_TCP);
if ($socket === false) {
    echo 'socket_create() failed: ', socket_strerror(socket_last_error()), "\n";
    exit(1);
}

if (socket_connect($socket, $address, 80) === false) {
    echo 'socket_connect() failed: ', socket_strerror(socket_last_error($socket)), "\n";
    exit(1);
}

$request = "HEAD / HTTP/1.0\r\nHost: www.example.com\r\n\r\n";
socket_write($socket, $request, strlen($request));

$answer = '';
while (($part = socket_read($socket, 2048)) !== false && $part !== '') {
    $answer .= $part;
}
socket_close($socket);
echo $answer;
