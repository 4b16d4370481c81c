"""Merges what a policy refuses onto a base profile: allowed is what both allow. Pure.

A profile is a set of rules of which libseccomp makes one decision; where two match the same call, which one wins depends on how they
are made up (a rule without comparisons always wins), so a refusal cannot simply be added beside the base's permission. A call that
weir restricts is therefore taken out of the base and put back as rules of which exactly one matches: the space of its arguments is
cut, bit by bit, until policy and base have one answer for the whole piece. Of the base's own rules the severest that matches counts.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from agent.errors import WeirError
from agent.seccomp.base import SEVERITY, Base, Condition, Entry, Op
from agent.seccomp.oci import ERRNO, Answer, Machine, entries, entry_of
from agent.seccomp.rules import Comparison, Deny

_REGISTER = 2**64 - 1
_MAX_STEPS = 10_000  # with the shipped policies, Docker's and Podman's profiles need under 2,000 for socket()
_MAX_PIECES = 1_000  # of a call; a filter has at most 4,096 instructions (BPF_MAXINSNS, linux/bpf_common.h), and each takes two or more

Known = Mapping[int, tuple[int, int]]
"""By argument: the bits that are fixed, and what they are."""
Bit = tuple[int, int]
"""An argument, and one bit of it."""
Piece = tuple[frozenset[tuple[Bit, bool]], Answer]
"""Bits that tell this piece from its neighbours, and the answer there."""


class Rule(NamedTuple):
    """Gives ``answer`` where every condition holds."""

    answer: Answer
    conditions: tuple[Condition, ...]


def merge(rules: Sequence[Deny], base: Base, this: Machine) -> dict[str, Any]:
    """Return an OCI profile that refuses with weir's errno what the rules refuse, and answers the rest as the base does.

    Without rules (a policy in audit mode) it is the base alone. Raises WeirError when the base's conditions are too many.
    """
    denied: dict[str, list[Rule]] = {}
    for rule in rules:
        conditions = tuple(Condition(c.argument, Op.MASKED_EQ, c.mask, c.value) for c in rule.comparisons)
        denied.setdefault(rule.call, []).append(Rule(Answer(ERRNO, rule.errno), conditions))
    doubtful: dict[str, list[Rule]] = {call: [] for entry in base.entries if not entry.certain for call in entry.calls}
    again: dict[str, list[Rule]] = {**doubtful, **denied}
    restricted = [
        (call, answer, comparisons)
        for call, ours in again.items()
        for comparisons, answer in _pieces(call, ours, _of_base(call, base.entries), base.default)
        if answer != base.default  # runtimes leave such rules out, and libseccomp refuses them
    ]
    return {
        "defaultAction": base.default.action,
        **({} if base.default.errno is None else {"defaultErrnoRet": base.default.errno}),
        "architectures": [this.native] if rules else [*base.architectures],
        **({} if base.flags is None else {"flags": [*base.flags]}),
        "syscalls": [*_kept(base.entries, again.keys()), *entries(restricted)],
    }


def _kept(listed: Iterable[Entry], again: Collection[str]) -> Iterator[dict[str, Any]]:
    """The base's entries for the calls that stay as they are."""
    for entry in listed:
        calls = [call for call in entry.calls if call not in again]
        if calls:
            yield entry_of(
                calls, entry.answer, [(c.argument, c.value, c.value_two, c.op.value) for c in entry.conditions]
            )


def _of_base(call: str, listed: Iterable[Entry]) -> list[Rule]:
    """The base's rules for a call, as runtimes read them: see oci.py about two comparisons of one argument."""
    found = []
    for entry in listed:
        if call in entry.calls:
            several = len({condition.argument for condition in entry.conditions}) < len(entry.conditions)
            alternatives = [(condition,) for condition in entry.conditions] if several else [entry.conditions]
            found += [Rule(entry.answer, conditions) for conditions in alternatives]
    return found


def _pieces(
    call: str, ours: Sequence[Rule], bases: Sequence[Rule], default: Answer
) -> Iterator[tuple[tuple[Comparison, ...], Answer]]:
    """Cut the space of a call's arguments into pieces with one answer each: they do not overlap, and nothing is left out."""
    steps = 0

    def cut(known: Known, ours: Sequence[Rule], bases: Sequence[Rule]) -> list[Piece]:
        nonlocal steps
        steps += 1
        if steps > _MAX_STEPS:
            raise _too_many(call)
        ours = [rule for rule in ours if _holds(rule, known) is not False]
        bases = [rule for rule in bases if _holds(rule, known) is not False]
        answer = _decided(ours, bases, default, known)
        if isinstance(answer, Answer):
            return [(frozenset(), answer)]
        argument, bit = answer
        mask, value = known.get(argument, (0, 0))
        off, on = (
            cut({**known, argument: (mask | bit, value | (bit if is_on else 0))}, ours, bases)
            for is_on in (False, True)
        )
        if off == on:
            return off
        return [
            (frozenset({*bits, ((argument, bit), is_on)}), piece)
            for half, is_on in ((off, False), (on, True))
            for bits, piece in half
        ]

    pieces = cut({}, ours, bases)
    if sum(answer != default for _, answer in pieces) > _MAX_PIECES:
        raise _too_many(call)
    for bits, answer in pieces:
        masks: dict[int, tuple[int, int]] = {}
        for (argument, bit), is_on in bits:
            mask, value = masks.get(argument, (0, 0))
            masks[argument] = (mask | bit, value | (bit if is_on else 0))
        yield tuple(Comparison(argument, *masks[argument]) for argument in sorted(masks)), answer


def _decided(ours: Sequence[Rule], bases: Sequence[Rule], default: Answer, known: Known) -> Answer | Bit:
    """Return the one answer for the whole piece, else the bit to cut it at. No rule here is out of the question."""
    if ours:  # no two of them match the same call
        return ours[0].answer if _holds(ours[0], known) else _open_bit(ours[0], known)
    best, undecided = default, bases
    for number, rule in sorted(enumerate(bases), key=lambda row: (-SEVERITY[row[1].answer.action], row[0])):
        if _holds(rule, known):
            best = rule.answer
            undecided = [
                other
                for place, other in enumerate(bases)
                if (-SEVERITY[other.answer.action], place) < (-SEVERITY[best.action], number)
            ]
            break
    for rule in undecided:
        if rule.answer != best:
            return _open_bit(rule, known)
    return best


def _open_bit(rule: Rule, known: Known) -> Bit:
    """Return the highest bit that an undecided rule asks about and that is not fixed yet."""
    condition = next(condition for condition in rule.conditions if _condition_holds(condition, known) is None)
    asked = condition.value if condition.op is Op.MASKED_EQ else _REGISTER
    open_bits = asked & ~known.get(condition.argument, (0, 0))[0]
    return condition.argument, 1 << open_bits.bit_length() - 1


def _holds(rule: Rule, known: Known) -> bool | None:
    """Return whether all conditions hold for every value with the known bits (True), for none (False), or for some (None)."""
    results = [_condition_holds(condition, known) for condition in rule.conditions]
    if False in results:
        return False
    return None if None in results else True


def _condition_holds(condition: Condition, known: Known) -> bool | None:
    mask, value = known.get(condition.argument, (0, 0))
    lowest, highest = value, value | (_REGISTER & ~mask)
    if condition.op is Op.MASKED_EQ:
        return _equal(mask, value, condition.value, condition.value_two)
    if condition.op is Op.EQ:
        return _equal(mask, value, _REGISTER, condition.value)
    if condition.op is Op.NE:
        equal = _equal(mask, value, _REGISTER, condition.value)
        return None if equal is None else not equal
    if condition.op in (Op.LT, Op.GE):
        less = True if highest < condition.value else False if lowest >= condition.value else None
        return less if less is None or condition.op is Op.LT else not less
    more = True if lowest > condition.value else False if highest <= condition.value else None
    return more if more is None or condition.op is Op.GT else not more


def _equal(mask: int, value: int, asked: int, datum: int) -> bool | None:
    if (value ^ datum) & mask & asked:
        return False
    return None if asked & ~mask else True


def _too_many(call: str) -> WeirError:
    return WeirError(
        f"the base profile cannot be used: its conditions on {call}() make too many rules together with the policy's",
        "Write them in a copy of the base with SCMP_CMP_EQ, or with SCMP_CMP_MASKED_EQ on fewer bits.",
    )
