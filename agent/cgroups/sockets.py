"""Which TCP sockets of a cgroup still have something to send (inet_diag, through pyroute2).

A socket closed with data in its buffer goes on sending without a process. inet_diag tells the cgroup of a socket since
Linux 5.10, and lists those of the caller's network namespace only.
"""

from __future__ import annotations

from collections.abc import Collection
from socket import AF_INET, AF_INET6

STILL_SENDING = {1: "ESTABLISHED", 4: "FIN_WAIT1", 8: "CLOSE_WAIT", 9: "LAST_ACK", 11: "CLOSING"}
"""States (include/net/tcp_states.h) of a socket without a process that has data, or its FIN, unacknowledged."""


def sending(cgroup_ids: Collection[int]) -> int:
    """How many TCP sockets made in these cgroups are still sending. Meant for cgroups without processes.

    Raises OSError where inet_diag is not to be had.
    """
    from pyroute2.netlink.diag import DiagSocket  # 20 MB, and needed for a moment at the end of a run

    states = sum(1 << state for state in STILL_SENDING)
    with DiagSocket() as diag:
        diag.bind()
        found = [socket for family in (AF_INET, AF_INET6) for socket in diag.get_sock_stats(family, states)]
    return sum(socket.get_attr("INET_DIAG_CGROUP_ID") in cgroup_ids for socket in found)
