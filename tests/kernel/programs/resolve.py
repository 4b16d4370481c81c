"""Resolves argv[1], connects to its port 80 by asyncio, starts children: prints one line for each."""

import asyncio
import multiprocessing
import socket
import sys


async def first_line(name: str) -> str:
    """Return the beginning of what the web server answers."""
    reader, writer = await asyncio.open_connection(name, 80, family=socket.AF_INET)
    writer.write(b"GET / HTTP/1.0\r\n\r\n")
    line = await reader.readline()
    writer.close()
    return line.decode()[:12]


def say(word: str) -> None:
    """Print from the child."""
    print(word, flush=True)


if __name__ == "__main__":
    for address in {entry[4][0] for entry in socket.getaddrinfo(sys.argv[1], 80, socket.AF_INET)}:
        print("resolved", address)
    print("connected", asyncio.run(first_line(sys.argv[1])), flush=True)
    child = multiprocessing.get_context("spawn").Process(target=say, args=("child",))
    child.start()
    child.join()
