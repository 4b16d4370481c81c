"""Which file a policy argument means, and the policy that is in it."""

from pathlib import Path

from agent.errors import WeirError
from agent.policy import sets
from agent.policy.model import Policy, Prefix
from agent.policy.parse import parse
from agent.policy.yamlfile import MAX_BYTES


def shipped(policies: Path = sets.POLICIES) -> tuple[str, ...]:
    """Return the names of the policies in the directory, sorted."""
    return tuple(sorted(file.stem for file in policies.glob("*.yaml")))


def find(argument: str, policies: Path = sets.POLICIES) -> Path:
    """Return the file that an argument means: a path when it has a / or a dot in it, else the name of a shipped policy.

    So `appengine` is the same policy in every working directory. Raises WeirError for an unknown name.
    """
    if "/" in argument or "." in argument:
        return Path(argument)
    names = shipped(policies)
    if argument not in names:
        known = f"Use one of {', '.join(names)}, or" if names else f"No policy is in {policies}: use"
        raise WeirError(
            f"there is no policy called {argument!r}",
            f"{known} the path of a file, such as ./{argument or 'policy'}.yaml.",
        )
    return policies / f"{argument}.yaml"


def load(argument: str, resolvers: tuple[Prefix, ...] | None = None, policies: Path = sets.POLICIES) -> Policy:
    """Return the policy that an argument means.

    ``resolvers`` is what the set of that name stands for; None takes the host's resolv.conf. Raises PolicyInvalid for a
    file that is no policy, and WeirError for one that cannot be read.
    """
    file = find(argument, policies)
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)  # one more than parse() accepts: no need to hold what it refuses
    except OSError as error:
        raise WeirError(f"the policy {file} cannot be read: {error.strerror}", "Check its path and mode.") from error
    return parse(data, str(file), sets.resolvers() if resolvers is None else resolvers, policies)
