"""Why a policy decides as it does: every rule that was looked at, and what kept it from matching."""

from dataclasses import dataclass, replace

from agent.policy.decide import Mismatch, decide, destination, embedded, judge, mismatch, normalise
from agent.policy.model import Action, Destination, Family, Flow, Policy, Rule, Verdict, format_address

MAX_LISTED = 4  # prefixes of a rule that are spelled out; more are counted


@dataclass(frozen=True)
class Step:
    """One rule that was looked at. ``mismatch`` is None for the rule that matched; ``why`` says it in words."""

    index: int
    rule: Rule
    mismatch: Mismatch | None
    why: str


@dataclass(frozen=True)
class Judgement:
    """The verdict on one address: the one asked about, or the IPv4 address inside it."""

    address: int
    embedded: bool
    steps: tuple[Step, ...]
    verdict: Verdict


@dataclass(frozen=True)
class Explanation:
    """Why a flow is allowed or refused.

    ``socket`` says why no such socket can be created at all, "" when it can. ``by_address`` is the verdict without DNS
    names, which is what the kernel enforces today.
    """

    policy: Policy
    flow: Flow
    socket: str
    judgements: tuple[Judgement, ...]
    verdict: Verdict
    by_address: Verdict
    destination: Destination

    @property
    def action(self) -> Action:
        """What happens to the flow, the creation of its socket included."""
        return Action.DENY if self.socket else self.verdict.action


def explain(policy: Policy, flow: Flow) -> Explanation:
    """Return why the policy decides a flow as it does. Raises WeirError when an address set cannot be read."""
    address = normalise(flow.address)
    judgements = [judgement(policy, replace(flow, address=address), inner=False)]
    inner = embedded(address)
    if inner is not None and judgements[0].verdict.action is Action.ALLOW:
        judgements.append(judgement(policy, replace(flow, address=inner), inner=True))
    return Explanation(
        policy=policy,
        flow=flow,
        socket=refused_at_socket(policy, flow),
        judgements=tuple(judgements),
        verdict=decide(policy, flow),
        by_address=decide(policy, replace(flow, names=frozenset())),
        destination=destination(address),
    )


def judgement(policy: Policy, flow: Flow, *, inner: bool) -> Judgement:
    """Return the verdict on a flow whose address is normalised, and each rule up to the one that matched."""
    verdict = judge(policy, flow)
    looked_at = policy.egress if verdict.rule is None else policy.egress[: verdict.rule + 1]
    steps = []
    for index, rule in enumerate(looked_at):
        miss = mismatch(rule, flow)
        steps.append(Step(index, rule, miss, reason(rule, flow, miss)))
    return Judgement(flow.address, inner, tuple(steps), verdict)


def reason(rule: Rule, flow: Flow, miss: Mismatch | None) -> str:
    """Say in words why a rule matches, or the first thing that keeps it from matching."""
    if miss is Mismatch.PROTOCOL:
        return f"is for {' and '.join(sorted(rule.protocols))} only"
    if miss is Mismatch.PORT:
        return f"is for {'port' if len(rule.ports) == 1 else 'ports'} {', '.join(str(ports) for ports in rule.ports)}"
    where = format_address(flow.address)
    prefixes = rule.prefixes or ()
    if miss is Mismatch.DESTINATION:
        few = map(str, prefixes) if len(prefixes) <= MAX_LISTED else [f"{len(prefixes)} prefixes"]
        return f"is for {', '.join([*rule.names, *few]) or 'no address on this host'}"
    if rule.prefixes is None:
        return "matches every destination"
    around = [prefix for prefix in prefixes if prefix.contains(flow.address)]
    if around:
        return f"{where} is in {max(around, key=lambda prefix: prefix.length)}"
    return f"the program resolved {', '.join(sorted(flow.names.intersection(rule.names)))}"


def refused_at_socket(policy: Policy, flow: Flow) -> str:
    """Say why socket() itself refuses whatever could carry the flow; "" when it does not."""
    sockets = policy.sockets
    if flow.protocol not in sockets.protocols:
        return f"spec.sockets.protocols lacks {flow.protocol.value}"
    if Family.INET6 in sockets.families:
        return ""  # an inet6 socket reaches IPv4 too, as ::ffff:a.b.c.d
    if flow.address >> 32 != 0xFFFF:
        return "spec.sockets.families lacks inet6"
    return "" if Family.INET in sockets.families else "spec.sockets.families lacks inet and inet6"


def as_json(explanation: Explanation) -> dict[str, object]:
    """Return an explanation as the JSON that `weir policy explain --json` prints."""
    policy, flow = explanation.policy, explanation.flow
    return {
        "policy": policy.name,
        "file": policy.source,
        "mode": policy.mode.value,
        "flow": {
            "protocol": flow.protocol.value,
            "address": format_address(flow.address),
            "port": flow.port,
            "names": sorted(flow.names),
        },
        "action": explanation.action.value,
        "rule": rule_name(policy, explanation.verdict),
        "socket": explanation.socket or None,
        "byAddress": {
            "action": explanation.by_address.action.value,
            "rule": rule_name(policy, explanation.by_address),
        },
        "destination": explanation.destination.value,
        "judgements": [
            {
                "address": format_address(one.address),
                "embedded": one.embedded,
                "action": one.verdict.action.value,
                "rule": rule_name(policy, one.verdict),
                "steps": [
                    {
                        "rule": step.rule.name,
                        "line": step.rule.line,
                        "mismatch": step.mismatch.value if step.mismatch else None,
                        "why": step.why,
                    }
                    for step in one.steps
                ],
            }
            for one in explanation.judgements
        ],
    }


def rule_name(policy: Policy, verdict: Verdict) -> str:
    """Return the name under which refusals are reported: the rule's, or `default`."""
    return "default" if verdict.rule is None else policy.egress[verdict.rule].name


def as_text(explanation: Explanation) -> str:
    """Return an explanation as the lines that `weir policy explain` prints."""
    policy, flow = explanation.policy, explanation.flow
    what = f"{flow.protocol.value} {format_address(flow.address)} port {flow.port}"
    lines = [f"{explanation.action.value}: {what}, by {decided_by(explanation)}"]
    if not explanation.socket:
        for one in explanation.judgements:
            lines += judgement_lines(policy, flow, one)
    lines.append(f"bytes to it count as {explanation.destination.value}")
    if not explanation.socket and explanation.by_address != explanation.verdict:
        today = f"{explanation.by_address.action.value} by {source(policy, explanation.by_address)}"
        lines.append(f"destination names are not in force yet: the kernel decides by address alone, {today}")
    if policy.mode.value == "audit" and explanation.action is Action.DENY:
        lines.append("the policy's mode is audit: this is counted and reported, and not refused")
    return "\n".join(lines)


def judgement_lines(policy: Policy, flow: Flow, one: Judgement) -> list[str]:
    """Return the heading of one judgement and a line for each rule that was looked at."""
    where = format_address(one.address)
    heading = f"judged as {where}"
    if one.embedded:
        heading = f"judged again as {where}, the IPv4 address inside it"
    elif one.address != flow.address:
        heading = f"judged as {where}, which is where Linux connects {format_address(flow.address)}"
    width = max((len(step.rule.name) for step in one.steps), default=0)
    lines = [f"  {heading}: {one.verdict.action.value} by {source(policy, one.verdict)}"]
    for step in one.steps:
        sign = "no " if step.mismatch else "yes"
        lines.append(f"    {sign} {step.rule.name:<{width}}  line {step.rule.line:<4} {step.why}")
    return lines


def decided_by(explanation: Explanation) -> str:
    """Return what decided, with the file and line of a rule."""
    if explanation.socket:
        return f"socket(): {explanation.socket}"
    return source(explanation.policy, explanation.verdict)


def source(policy: Policy, verdict: Verdict) -> str:
    """Return the rule behind a verdict with its place in the file, or the default."""
    if verdict.rule is None:
        return f"spec.default ({policy.source})"
    rule = policy.egress[verdict.rule]
    return f"rule {rule.name} ({policy.source}:{rule.line})"
