"""A node as deploy/README.md makes one, on a plain host: containerd, the agent, and Prometheus that looks at it.

with monitored(tmp_path) as node:
    web = node.start("shop", "web-0", policy="appengine")
    node.send(web, "udp", addresses.PUBLIC, count=100, size=100)
    node.prometheus.query('weir_egress_bytes_total{pod="web-0"}')

The containers are in the client's namespace of a World: what they send arrives at the peer, which is every address.
"""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from tests import addresses
from tests.deploy.copies import DEPLOY
from tests.node.agent import AgentSite, Running, agent_site
from tests.node.containerd import containerd
from tests.node.images import compiled
from tests.node.kubelet import FOREVER, Container, Kubelet, Pod, Said
from tests.node.ports import reserve
from tests.node.prometheus import Prometheus, prometheus
from tests.servers import SINK_PORT
from tests.world import LINK, Side, World

IMAGE = "weir.test/send:1"

EARLY = (
    "/bin/sh",
    "-c",
    f"(until [ -e /tmp/go ]; do sleep 0.1; done; echo) | send late {addresses.PUBLIC} {SINK_PORT} 1 10 0; exec sleep 100000",
)
"""A socket that is older than the agent, and sends once it is told to."""

POLICIES = DEPLOY.parent / "policies"

SEND = r"""
#include <arpa/inet.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* send udp|late|tcp ADDRESS PORT COUNT SIZE PAUSE: so many writes of so many bytes, with microseconds between them. Exits
 * with the errno of the last failure. late is udp that begins when there is something on standard input; tcp waits until
 * the peer has read all: then every segment is the socket's own. */
int main(int argc, char **argv)
{
	static char data[65536];
	int six = strchr(argv[2], ':') != NULL, tcp = !strcmp(argv[1], "tcp"), failed = 0, fd;
	int count = atoi(argv[4]), size = atoi(argv[5]), pause = atoi(argv[6]);
	struct sockaddr_in6 to6 = {.sin6_family = AF_INET6, .sin6_port = htons(atoi(argv[3]))};
	struct sockaddr_in to4 = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[3]))};
	struct sockaddr *to = six ? (struct sockaddr *)&to6 : (struct sockaddr *)&to4;
	socklen_t length = six ? sizeof(to6) : sizeof(to4);

	if (inet_pton(to->sa_family, argv[2], six ? (void *)&to6.sin6_addr : (void *)&to4.sin_addr) != 1)
		return EINVAL;
	fd = socket(to->sa_family, tcp ? SOCK_STREAM : SOCK_DGRAM, 0);
	if (fd < 0 || (tcp && connect(fd, to, length)))
		return errno;
	if (!strcmp(argv[1], "late") && read(0, data, 1) < 0)
		return errno;
	while (count-- > 0) {
		if (sendto(fd, data, size, 0, tcp ? NULL : to, tcp ? 0 : length) < 0)
			failed = errno;
		if (pause)
			usleep(pause);
	}
	if (tcp && (shutdown(fd, SHUT_WR) || read(fd, data, 1)))
		return errno;
	return failed;
}
"""

ETHERNET_HEADER = 14  # bytes, which a device counts

CADVISOR = """\
# HELP container_network_transmit_bytes_total Cumulative count of bytes transmitted
# TYPE container_network_transmit_bytes_total counter
"""


def settings() -> tuple[str, ...]:
    """What deploy/systemd/agent.env sets, for the environment."""
    lines = (DEPLOY / "systemd/agent.env").read_text().splitlines()
    return tuple(line for line in lines if line and not line.startswith("#"))


@dataclass
class Node:
    """What is there. ``agent`` is replaced by `restart`.

    ``early`` is older than the first agent; ``began`` is when that was ready; ``client`` is the image's program, outside.
    """

    world: World
    kubelet: Kubelet
    site: AgentSite
    agent: Running
    pods: list[Pod]
    early: Container
    prometheus: Prometheus
    began: float
    client: Path

    def start(
        self, namespace: str, name: str, command: Sequence[str] = FOREVER, *, policy: str | None = None
    ) -> Container:
        """A pod with one container, `main`; with the annotation when a policy is named."""
        return start(self.kubelet, self.pods, namespace, name, command, policy=policy)

    def send(self, container: Container, how: str, to: str, count: int, size: int, pause: int = 0) -> int:
        """Send from a container to the peer's sink; the errno of the last failure, 0 without one."""
        command = ["/bin/send", how, to, str(SINK_PORT), str(count), str(size), str(pause)]
        said: Said = self.kubelet.exec(container, command)
        return said.code

    def end(self) -> None:
        """Kill the agent."""
        if self.agent.process.poll() is None:
            self.agent.end(signal.SIGKILL)

    def restart(self, *, ready: bool = True) -> None:
        """A new agent, on the same port, when the old one has ended."""
        self.agent = start_agent(self.site, self.agent.port)
        if ready:
            self.agent.ready()

    def named(self, container: Container) -> None:
        """Wait until the agent knows a container's names, and Prometheus has seen them."""
        selector = f'weir_sockets{{pod="{container.pod.name}", container="{container.name}"}}'
        self.prometheus.until(lambda: self.prometheus.query(selector), lambda: f"no {selector}")


def start(
    kubelet: Kubelet, pods: list[Pod], namespace: str, name: str, command: Sequence[str], *, policy: str | None
) -> Container:
    pods.append(kubelet.pod(namespace, name, annotations={"weir.dev/policy": policy} if policy else {}))
    return kubelet.container(pods[-1], "main", IMAGE, command)


def start_agent(site: AgentSite, port: int) -> Running:
    """An agent as deploy/systemd has it, at a port that stays the same: Prometheus' label `instance` has it."""
    site.options["--listen"] = f"127.0.0.1:{port}"
    made = site.start(prefix=("/usr/bin/env", *settings()))
    made.port = port
    return made


@contextmanager
def kubelets_page(world: World, pods: list[Pod]) -> Iterator[int]:
    """A page in the form of the kubelet's /metrics/cadvisor, which needs a kubelet; its port.

    One series for each pod, by its sandbox. The number is that of the network device, which these pods share.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            count = world.counters()
            sent = count.bytes + ETHERNET_HEADER * count.packets
            lines = [
                f'container_network_transmit_bytes_total{{container="",id="{pod.cgroup}/{pod.id}",image="pause",'
                f'interface="{LINK}",name="{pod.id}",namespace="{pod.namespace}",pod="{pod.name}"}} {sent}\n'
                for pod in pods
            ]
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write((CADVISOR + "".join(lines)).encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def monitored(folder: Path) -> Iterator[Node]:
    """The node, from nothing: a pod that is older than the agent, the agent under deploy's settings, Prometheus."""
    with ExitStack() as stack:
        world = stack.enter_context(World(offloads=False))
        netns = Path("/run/netns", world.name(Side.CLIENT))
        (folder / "containerd").mkdir()
        c = stack.enter_context(containerd(folder / "containerd", netns=netns))
        c.image(IMAGE, {"/bin/send": compiled(SEND, folder / "send")})
        kubelet = stack.enter_context(Kubelet(c))
        pods: list[Pod] = []
        site = stack.enter_context(agent_site(folder, c.cgroups))
        site.options = {"--cri": str(c.socket)}
        for name in ("appengine.yaml", "audit.yaml"):
            shutil.copy(POLICIES / name, site.policies)
        early = start(kubelet, pods, "old", "early-0", EARLY, policy=None)
        page, port = stack.enter_context(kubelets_page(world, pods)), reserve(stack)
        looking = stack.enter_context(prometheus(folder / "prometheus", port, {"kubelet": page}))
        node = Node(world, kubelet, site, start_agent(site, port), pods, early, looking, time.time(), folder / "send")
        stack.callback(node.end)
        node.agent.ready()
        looking.scraped_since(node.began)
        yield node
