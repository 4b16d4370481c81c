"""``weir agent``: the node agent."""

from __future__ import annotations

import platform
from pathlib import Path

import click

from agent.cgroups import roots
from agent.node import log
from agent.node.ask import door
from agent.node.settings import Settings, cri_sockets, duration
from agent.node.tls import tls_of
from agent.place import Place, pins_of
from agent.seccomp import base, oci

PATH = click.Path(path_type=Path, readable=False)  # what cannot be read is said by whoever reads it


@click.command(
    epilog="\b\nExamples:\n  weir agent --policies /etc/weir/policies --default appengine\n"
    "  weir agent --root 'tenant-*' --default audit --cri none        # a plain host, a soft start"
)
@click.option(
    "--policies",
    type=PATH,
    default="/etc/weir/policies",
    show_default=True,
    envvar="WEIR_POLICY_DIR",
    help="Directory of policies (*.yaml); changes are taken up while the agent runs.",
)
@click.option(
    "--default",
    default="appengine",
    show_default=True,
    envvar="WEIR_DEFAULT",
    help="Policy of the managed parents: a name in the directory, else a shipped one.",
)
@click.option(
    "--root",
    "globs",
    multiple=True,
    metavar="GLOB",
    envvar="WEIR_ROOT",
    help=f"A managed parent below the cgroup2 mount; may be repeated.  [default: {' '.join(roots.DEFAULT)}]",
)
@click.option(
    "--cri",
    metavar="SOCKET",
    envvar="WEIR_CRI",
    help="The container runtime's socket, or none.  [default: containerd's or CRI-O's, whichever there is]",
)
@click.option(
    "--listen",
    default="127.0.0.1:9469",
    show_default=True,
    envvar="WEIR_LISTEN",
    help="ADDRESS:PORT of /metrics, /healthz and /readyz, or none.",
)
@click.option("--tls-cert", type=PATH, envvar="WEIR_TLS_CERT", help="Serve TLS with this certificate (PEM).")
@click.option("--tls-key", type=PATH, envvar="WEIR_TLS_KEY", help="The certificate's key.")
@click.option(
    "--tls-client-ca", type=PATH, envvar="WEIR_TLS_CLIENT_CA", help="Ask clients for a certificate of this authority."
)
@click.option(
    "--socket",
    type=PATH,
    envvar="WEIR_SOCKET",
    help="Where weir status, events and top find the agent; for root alone.  [default: /run/weir/agent.sock]",
)
@click.option(
    "--seccomp-dir",
    type=PATH,
    envvar="WEIR_SECCOMP_DIR",
    help="Write a seccomp profile for each policy to DIR/weir/POLICY.json (the kubelet's is /var/lib/kubelet/seccomp).",
)
@click.option(
    "--seccomp-base",
    type=PATH,
    envvar="WEIR_SECCOMP_BASE",
    help="Merge them onto this profile, so that nothing that it denies becomes allowed.",
)
@click.option(
    "--retain",
    default="10m",
    show_default=True,
    envvar="WEIR_RETAIN",
    help="How long the last values of a container that is gone stay.",
)
@click.option(
    "--reconcile",
    default="60s",
    show_default=True,
    envvar="WEIR_RECONCILE",
    help="How often everything is looked at, notified or not.",
)
@click.option(
    "--log-format",
    type=click.Choice(log.FORMATS),
    default="text",
    show_default=True,
    envvar="WEIR_LOG_FORMAT",
    help="The log goes to standard error.",
)
@click.option(
    "--log-level",
    type=click.Choice(log.LEVELS),
    default="info",
    show_default=True,
    envvar="WEIR_LOG_LEVEL",
)
@click.option("--no-events", is_flag=True, envvar="WEIR_NO_EVENTS", help="No events on standard output.")
@click.option(
    "--unload-on-exit",
    is_flag=True,
    envvar="WEIR_UNLOAD_ON_EXIT",
    help="Set everything free at the end; without it all rules stay in force.",
)
@click.option(
    "--max-containers",
    type=click.IntRange(2, 65535),
    envvar="WEIR_MAX_CONTAINERS",
    help="Cgroups at one time, when the programs are loaded first.  [default: 4096]",
)
def agent(
    policies: Path,
    default: str,
    globs: tuple[str, ...],
    cri: str | None,
    listen: str,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_client_ca: Path | None,
    socket: Path | None,
    seccomp_dir: Path | None,
    seccomp_base: Path | None,
    retain: str,
    reconcile: str,
    log_format: str,
    log_level: str,
    no_events: bool,
    unload_on_exit: bool,
    max_containers: int | None,
) -> int:
    """Find the containers of this node, keep each under its policy, and export what they send.

    The managed parents (kubepods) come under the default policy, so that a container is covered from its birth,
    whether the agent runs or not; each container then gets its own policy: by its pod's annotation weir.dev/policy, else
    by the first policy whose selector matches, else the default. Stopping the agent leaves all rules in force.

    Each option can be given by the environment too: --log-format as WEIR_LOG_FORMAT, and so on; --policies as WEIR_POLICY_DIR.
    """
    from agent.node.daemon import Agent

    log.set_up(log_format, log_level)
    settings = Settings(
        policies=policies,
        default=default,
        roots=roots.parse(globs or roots.DEFAULT),
        cri=cri_sockets(cri),
        listen=None if listen == "none" else listen,
        tls=tls_of(tls_cert, tls_key, tls_client_ca),
        socket=socket or door(pins_of()),
        seccomp=seccomp_dir,
        seccomp_base=readable_base(seccomp_base),
        retain=duration(retain, "--retain"),
        reconcile=duration(reconcile, "--reconcile"),
        events=not no_events,
        unload_on_exit=unload_on_exit,
        max_containers=max_containers,
    )
    Agent(Place.here(), settings).run()
    return 0


def readable_base(file: Path | None) -> Path | None:
    """The base, once it is known to be one. Raises WeirError when it is none."""
    if file:
        base.load(file, oci.machine(platform.machine()), ())
    return file
