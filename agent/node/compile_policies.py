"""The process that compiles policies for the agent: `python -m agent.node.compile_policies`, started by compiling.py.

The order comes as JSON on stdin; answers go to stdout, pickled one by one, so that it shows on which file it died.
"""

import hashlib
import json
import pickle
import resource
import signal
import stat
import sys
from contextlib import suppress
from pathlib import Path

from agent.controller import compiled
from agent.errors import WeirError
from agent.node.compiling import STARTED, Answer, Loaded, Task
from agent.node.profiles import profile_of
from agent.node.state import PolicyState
from agent.policy import find, sets
from agent.policy.model import Policy, Prefix
from agent.policy.parse import parse
from agent.policy.yamlfile import MAX_BYTES

MEMORY = 1 << 29  # bytes of address space; twice what the largest file takes, right or wrong
MAX_PROBLEM = 4000  # characters; the agent keeps the problem of each file


def main() -> None:
    """Answer every task of the order, in its order."""
    order = json.load(sys.stdin)
    confine()
    servers = order["resolvers"]
    resolvers = None if servers is None else tuple(Prefix.parse(server) for server in servers)
    seccomp_base = Path(order["seccomp_base"]) if order["seccomp_base"] else None
    pickler = pickle.Pickler(sys.stdout.buffer)  # one for all: what policies share is written once
    pickler.dump(STARTED)
    sys.stdout.flush()
    for fields in order["tasks"]:
        signal.alarm(order["seconds"])  # ends the process if the agent is no longer there to do it
        task = Task(**fields)
        pickler.dump((task.key, answer(task, resolvers, seccomp_base)))
        sys.stdout.flush()


def confine() -> None:
    """Limit the memory, and be the first to go where it runs out: the agent shares its cgroup's limit."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with suppress(OSError):  # a precaution only
        Path("/proc/self/oom_score_adj").write_text("1000", "ascii")


def answer(task: Task, resolvers: tuple[Prefix, ...] | None, seccomp_base: Path | None) -> Answer:
    """Compile one file."""
    digest = ""
    try:
        file = shipped(task.file) if task.shipped else Path(task.file)
        data = read(file)
        digest = hashlib.sha256(data).hexdigest()
        if digest == task.known:
            return Answer(digest)
        policy = parse(data, str(file), sets.resolvers() if resolvers is None else resolvers)
        state = PolicyState(policy.name, policy.source, policy.sha256, policy.mode.value)
        return Answer(digest, Loaded(compiled(policy), policy.selector, state, profile(policy, seccomp_base)))
    except WeirError as error:
        text = str(error)
        return Answer(digest, problem=text if len(text) <= MAX_PROBLEM else text[:MAX_PROBLEM] + " …")


def profile(policy: Policy, base: Path | None) -> str:
    """Return the policy's seccomp profile as JSON; "" when the machine or the base is one that weir cannot use."""
    try:
        return sys.intern(json.dumps(profile_of(policy, base)))  # many policies share one; pickled, it is still one
    except WeirError:
        return ""


def shipped(name: str) -> Path:
    """Return the file of a shipped policy. Raises WeirError for a name that none has."""
    if name not in find.shipped():
        raise WeirError(f"no policy is called {name!r}", f"The shipped ones are {', '.join(find.shipped())}.")
    return find.find(name)


def read(file: Path) -> bytes:
    """Return what is in a file, up to one byte more than a policy may have. Raises WeirError when it cannot be read."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise WeirError(f"the policy {file} is no regular file", "Put a file there, or a link to one.")
        with file.open("rb") as stream:
            return stream.read(MAX_BYTES + 1)
    except OSError as error:  # a FIFO that comes in between waits for a writer, and this process has a time limit
        raise WeirError(f"the policy {file} cannot be read: {error.strerror}", "Check its path and mode.") from error


if __name__ == "__main__":
    main()
