"""From the votes on one criterion of one response to a gold verdict, a third reader, or neither.

A vote is met, unmet (of a veto: violated, not violated) or cannot say, and may carry the flag
"guidelines differ". A vote with that flag, or cannot say, supports no verdict, but it is a vote.

    Rule 1  Fewer first readers than were asked, and never fewer than two: pending.
    Rule 2  A verdict that more than half of all votes support is gold: `agreed` if the first
            readers suffice, `adjudicated` if it took a third one.
    Rule 3  Else, if nobody read third yet and one more vote could make such a majority: a third
            reader has to decide.
    Rule 4  Else: contested. It is published as such and left out of every accuracy figure.

So two first readers who differ go to a third; two who both cannot say, or both say that guidelines
differ, are contested at once, because they agree that there is no verdict; and a third who cannot
say, or says that guidelines differ, leaves it contested. A third reader's vote counts as it stands
after they saw the first two; the blind one before that is kept beside it. All votes are kept, in
every case; who reads third, and what they are shown, is `promedical.review.adjudication`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from promedical.rubric import Verdict

__all__ = ["Ballot", "Consensus", "ConsensusError", "Standing", "decide"]


class ConsensusError(ValueError):
    """A vote that cannot be counted; the message says which."""


class Standing(StrEnum):
    """How far a criterion of a response is."""

    PENDING = "pending"
    NEEDS_THIRD = "needs_third"
    AGREED = "agreed"
    ADJUDICATED = "adjudicated"
    CONTESTED = "contested"


@dataclass(frozen=True)
class Ballot:
    """One physician's vote on one criterion of one response.

    Args:
        reader: who, by a pseudonym or id; a reader votes once.
        verdict: met, unmet or abstain (cannot say).
        disputed: whether they say that experts disagree or guidelines differ here.
        third: whether they read it because the first readers did not settle it.
        note: their remark, or "".
        blind: a third reader's verdict before they saw the others'; None for a first reader.
        blind_disputed: the flag at that time.
    """

    reader: str
    verdict: Verdict
    disputed: bool = False
    third: bool = False
    note: str = ""
    blind: Verdict | None = None
    blind_disputed: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "verdict", Verdict(self.verdict))
        if self.verdict is Verdict.ERROR or self.blind is Verdict.ERROR:
            raise ConsensusError(
                f"vote of {self.reader!r}: found 'error', expected met, unmet or abstain"
            )

    @property
    def supports(self) -> Verdict | None:
        """The verdict this vote is for, if for any."""
        return self.verdict if self.verdict.resolved and not self.disputed else None


@dataclass(frozen=True)
class Consensus:
    """What the votes come to.

    Args:
        standing: how far it is.
        gold: met or unmet if agreed or adjudicated, else None.
        ballots: every vote, first readers before third ones, then by reader.
        reason: of a contested one: "guidelines differ" if any reader says so, else "cannot say" if
            any cannot, else "no majority"; "" otherwise.
    """

    standing: Standing
    gold: Verdict | None
    ballots: tuple[Ballot, ...]
    reason: str = ""

    @property
    def verdict(self) -> Verdict:
        """The gold verdict as a bench row holds it: contested and unfinished ones are unknown."""
        return Verdict.ABSTAIN if self.gold is None else self.gold


def decide(ballots: Sequence[Ballot], *, first_readers: int = 2) -> Consensus:
    """Apply the rules above; the order of the votes has no influence.

    Args:
        ballots: votes on one criterion of one response, a reader at most once.
        first_readers: how many independent first readers it was given to, at least 2.

    Raises:
        ConsensusError: a reader who voted twice, or fewer than two first readers asked.
    """
    if first_readers < 2:
        raise ConsensusError(f"first_readers: found {first_readers}, expected at least 2")
    kept = tuple(sorted(ballots, key=lambda b: (b.third, b.reader)))
    readers = [ballot.reader for ballot in kept]
    if len(set(readers)) != len(readers):
        raise ConsensusError(f"votes: found readers {readers}, expected each once")
    firsts = sum(not ballot.third for ballot in kept)
    if firsts < first_readers:
        return Consensus(Standing.PENDING, None, kept)
    support = {
        verdict: sum(ballot.supports is verdict for ballot in kept)
        for verdict in (Verdict.MET, Verdict.UNMET)
    }
    third_read = firsts < len(kept)
    most = max(support, key=lambda verdict: support[verdict])
    if 2 * support[most] > len(kept):
        standing = Standing.ADJUDICATED if third_read else Standing.AGREED
        return Consensus(standing, most, kept)
    if not third_read and 2 * (support[most] + 1) > len(kept) + 1:
        return Consensus(Standing.NEEDS_THIRD, None, kept)
    return Consensus(Standing.CONTESTED, None, kept, _reason(kept))


def _reason(ballots: Sequence[Ballot]) -> str:
    if any(ballot.disputed for ballot in ballots):
        return "guidelines differ"
    if any(ballot.verdict is Verdict.ABSTAIN for ballot in ballots):
        return "cannot say"
    return "no majority"
