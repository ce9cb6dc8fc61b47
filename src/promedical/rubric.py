"""Rubrics, verdicts, scores: what an answer is worth, and which of two answers is better.

Implements section 2 of the method (three tiers, lexicographic preference, reward) with the
standard library alone, so that a notebook, a reward server and a trainer share one definition.

    S1 = Σ ω_i v_i          main proficiency, ω_i ≥ 0, Σ ω_i = 1
    S2 = #excellence met    excellence bonus
    S3 = #veto violated     safety veto
    preference: smaller S3, then larger S1, then larger S2
    r = clip(S1 + α·S2, 0, 1 + β) − λ·S3

A verdict that is not a verdict (abstain, error) widens a score to an interval; it never counts as
"safe". Left to others: who gives the verdicts (`promedical.reward_model`, physicians), and where
rubrics come from (`promedical.corpus`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, TypeGuard

__all__ = [
    "Criterion",
    "Preference",
    "RewardSpec",
    "Rubric",
    "RubricError",
    "Scores",
    "Tier",
    "Unresolved",
    "Verdict",
    "VetoKind",
    "compare",
    "reward",
    "score",
]

WEIGHT_TOLERANCE = 1e-6


class RubricError(ValueError):
    """A rubric, verdict or parameter that cannot be used; the message names the field and value."""


class Tier(StrEnum):
    """The three tiers of a rubric."""

    PROFICIENCY = "proficiency"
    EXCELLENCE = "excellence"
    VETO = "veto"


class VetoKind(StrEnum):
    """What a veto criterion forbids. `MISSED_EMERGENCY` is ours; the others are the paper's."""

    SEVERE_HALLUCINATION = "severe_hallucination"
    HARMFUL_ADVICE = "harmful_advice"
    FABRICATED_CREDENTIALS = "fabricated_credentials"
    PRIVACY_BREACH = "privacy_breach"
    DISCRIMINATION = "discrimination"
    BEYOND_REMIT = "beyond_remit"
    MISSED_EMERGENCY = "missed_emergency"


class Verdict(StrEnum):
    """Whether a criterion's sentence is true of a response, in every tier.

    A veto sentence describes the violation, so `MET` on a veto means violated.
    """

    MET = "met"
    UNMET = "unmet"
    ABSTAIN = "abstain"
    ERROR = "error"

    @property
    def resolved(self) -> bool:
        """Whether it was decided at all (met or unmet)."""
        return self in (Verdict.MET, Verdict.UNMET)

    def label(self, tier: Tier) -> str:
        """What a person is shown; a veto never reads met or unmet."""
        if self is Verdict.ERROR:
            return "judgment failed"
        if self is Verdict.ABSTAIN:
            return "cannot say"
        if tier is Tier.VETO:
            return "violated" if self is Verdict.MET else "not violated"
        return "met" if self is Verdict.MET else "not met"


class Preference(StrEnum):
    """Outcome of comparing two responses."""

    FIRST = "first"
    SECOND = "second"
    TIE = "tie"
    UNRESOLVED = "unresolved"


@dataclass(frozen=True)
class Criterion:
    """One sentence that is true or false of a response.

    Args:
        id: unique in its rubric.
        tier: which tier it counts in.
        text: the sentence; for a veto it describes the violation.
        weight: ω ≥ 0 for proficiency, None in the other tiers.
        axis: optional label such as "accuracy" or "completeness".
        kind: for a veto, what it forbids; None in the other tiers.

    Raises:
        RubricError: an empty id or text, a weight that is negative, not finite, missing or out of
            place, or a kind on a criterion that is no veto.
    """

    id: str
    tier: Tier
    text: str
    weight: float | None = None
    axis: str | None = None
    kind: VetoKind | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not self.id:
            raise RubricError(f"criterion id: found {self.id!r}, expected a non-empty string")
        where = f"criterion {self.id!r}"
        for name, enum in (("tier", Tier), ("kind", VetoKind)):
            value = getattr(self, name)
            if value is None and name == "kind":
                continue
            try:
                object.__setattr__(self, name, enum(value))
            except ValueError:
                allowed = ", ".join(member.value for member in enum)
                raise RubricError(
                    f"{where}: {name}: found {value!r}, expected one of {allowed}"
                ) from None
        if not isinstance(self.text, str) or not self.text.strip():
            raise RubricError(f"{where}: text: found {self.text!r}, expected a sentence")
        if self.tier is Tier.PROFICIENCY:
            if not _is_finite(self.weight) or self.weight < 0:
                raise RubricError(f"{where}: weight: found {self.weight!r}, expected a number ≥ 0")
        elif self.weight is not None:
            raise RubricError(
                f"{where}: weight: found {self.weight!r}, expected None outside proficiency"
            )
        if self.kind is not None and self.tier is not Tier.VETO:
            raise RubricError(
                f"{where}: kind: found {self.kind.value!r}, but only veto criteria have a kind"
            )


@dataclass(frozen=True)
class Rubric:
    """The criteria of one instruction, in three tiers.

    Args:
        criteria: every criterion, ids unique; proficiency weights sum to 1 within 1e-6.
        safety_only: whether the proficiency tier is empty on purpose.

    Raises:
        RubricError: duplicate ids, weights that do not sum to 1, or a proficiency tier whose
            presence disagrees with `safety_only`.
    """

    criteria: tuple[Criterion, ...]
    safety_only: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "criteria", tuple(self.criteria))
        seen: set[str] = set()
        for criterion in self.criteria:
            if criterion.id in seen:
                raise RubricError(f"criteria: id {criterion.id!r} repeats, expected unique ids")
            seen.add(criterion.id)
        weights = [c.weight for c in self.tier(Tier.PROFICIENCY) if c.weight is not None]
        if self.safety_only:
            if weights:
                raise RubricError(
                    f"safety_only: found {len(weights)} proficiency criteria, expected none"
                )
            return
        if not weights:
            raise RubricError(
                "criteria: the proficiency tier is empty; add a proficiency criterion or set "
                "safety_only=True"
            )
        total = sum(weights)  # not fsum, which raises where huge weights overflow
        if abs(total - 1) > WEIGHT_TOLERANCE:
            raise RubricError(f"criteria: proficiency weights sum to {total!r}, expected 1")

    def tier(self, tier: Tier) -> tuple[Criterion, ...]:
        """The criteria of one tier, in order."""
        return tuple(c for c in self.criteria if c.tier is tier)

    def __getitem__(self, criterion_id: str) -> Criterion:
        for criterion in self.criteria:
            if criterion.id == criterion_id:
                return criterion
        raise KeyError(criterion_id)

    def restricted_to(self, ids: set[str] | frozenset[str]) -> Rubric | None:
        """This rubric cut down to some of its criteria, weights re-normalised to sum 1.

        Returns None if no proficiency criterion of positive weight is left of a rubric that had
        one: without it there is no S1 to compare (section 7.3).
        """
        kept = [c for c in self.criteria if c.id in ids]
        total = math.fsum(c.weight for c in kept if c.weight is not None)
        if not self.safety_only and total <= 0:
            return None
        rescaled = tuple(
            Criterion(c.id, c.tier, c.text, c.weight / total, c.axis, c.kind)
            if c.weight is not None
            else c
            for c in kept
        )
        return Rubric(rescaled, safety_only=self.safety_only)


@dataclass(frozen=True)
class Unresolved:
    """How much of a score is still open: criteria that were abstained on or failed.

    Args:
        weight: Σω of unresolved proficiency criteria.
        bonus: number of unresolved excellence criteria.
        veto: number of unresolved veto criteria.
        errors: number of failed judgments in any tier (they are in the other counts too).
    """

    weight: float = 0.0
    bonus: int = 0
    veto: int = 0
    errors: int = 0


@dataclass(frozen=True)
class Scores:
    """S1, S2, S3 of a response, counting what is resolved, and what is not.

    S1 ∈ [s1, s1 + unresolved.weight], likewise S2 and S3; s1 is None for a safety-only rubric.
    """

    s1: float | None
    s2: int
    s3: int
    unresolved: Unresolved = field(default_factory=Unresolved)


@dataclass(frozen=True)
class RewardSpec:
    """Parameters of r = clip(S1 + α·S2, 0, 1+β) − λ·S3.

    Args:
        alpha: worth of one excellence criterion, 0 ≤ α < 1.
        beta: room above S1 = 1, β > 0, so that excellence keeps a gradient.
        lam: cost of one violation, λ ≥ 1 + β, so that it outweighs everything else.
        ablation: the only way to lift a bound: "no_veto" (λ must be 0) or "no_bonus_margin"
            (β must be 0).

    Raises:
        RubricError: a parameter out of its range.
    """

    alpha: float = 0.05
    beta: float = 0.2
    lam: float = 1.5
    ablation: Literal["no_veto", "no_bonus_margin"] | None = None

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "lam"):
            value = getattr(self, name)
            if not _is_finite(value):
                raise RubricError(f"{name}: found {value!r}, expected a finite number")
        if self.ablation not in (None, "no_veto", "no_bonus_margin"):
            raise RubricError(
                f"ablation: found {self.ablation!r}, expected None, 'no_veto' or 'no_bonus_margin'"
            )
        if not 0 <= self.alpha < 1:
            raise RubricError(f"alpha: found {self.alpha!r}, expected 0 ≤ alpha < 1")
        if self.ablation == "no_bonus_margin":
            if self.beta != 0:
                raise RubricError(f"beta: found {self.beta!r}, expected 0 with no_bonus_margin")
        elif self.beta <= 0:
            raise RubricError(f"beta: found {self.beta!r}, expected beta > 0")
        if self.ablation == "no_veto":
            if self.lam != 0:
                raise RubricError(f"lam: found {self.lam!r}, expected 0 with no_veto")
        elif self.lam < 1 + self.beta:
            raise RubricError(f"lam: found {self.lam!r}, expected lam ≥ 1 + beta = {1 + self.beta}")


def score(
    rubric: Rubric,
    verdicts: Mapping[str, Verdict],
    *,
    degrees: Mapping[str, float] | None = None,
) -> Scores:
    """Add up verdicts into S1, S2, S3 and what is unresolved (section 2).

    Args:
        rubric: the criteria.
        verdicts: one verdict for every criterion id of the rubric, and no other id.
        degrees: optional v_i ∈ [0, 1] for proficiency criteria whose verdict is resolved; without
            it v_i is 1 for met and 0 for unmet.

    Raises:
        RubricError: a missing or unknown criterion id, or a degree out of range or out of place.
    """
    by_id = {c.id: c for c in rubric.criteria}
    missing = [i for i in by_id if i not in verdicts]
    if missing:
        raise RubricError(f"verdicts: no verdict for criteria {missing}, expected one for each")
    unknown = [i for i in verdicts if i not in by_id]
    if unknown:
        raise RubricError(f"verdicts: unknown criteria {unknown}, expected ids of {list(by_id)}")
    given: dict[str, Verdict] = {}
    for criterion_id, value in verdicts.items():
        try:
            given[criterion_id] = Verdict(value)
        except ValueError:
            raise RubricError(
                f"verdicts[{criterion_id!r}]: found {value!r}, "
                "expected met, unmet, abstain or error"
            ) from None
    degrees = {} if degrees is None else degrees
    for criterion_id, degree in degrees.items():
        where = f"degrees[{criterion_id!r}]"
        if criterion_id not in by_id or by_id[criterion_id].tier is not Tier.PROFICIENCY:
            raise RubricError(f"{where}: expected the id of a proficiency criterion")
        if not given[criterion_id].resolved:
            raise RubricError(f"{where}: its verdict is {given[criterion_id].value}, not resolved")
        if not _is_finite(degree) or not 0 <= degree <= 1:
            raise RubricError(f"{where}: found {degree!r}, expected a number in [0, 1]")

    earned: list[float] = []
    open_weight: list[float] = []
    s2 = s3 = bonus = veto = errors = 0
    for criterion in rubric.criteria:
        verdict = given[criterion.id]
        errors += verdict is Verdict.ERROR
        met = verdict is Verdict.MET
        if criterion.tier is Tier.PROFICIENCY:
            assert criterion.weight is not None
            if verdict.resolved:
                earned.append(criterion.weight * degrees.get(criterion.id, float(met)))
            else:
                open_weight.append(criterion.weight)
        elif criterion.tier is Tier.EXCELLENCE:
            s2 += met
            bonus += not verdict.resolved
        else:
            s3 += met
            veto += not verdict.resolved
    # fsum is exact before rounding, so the order of the criteria cannot matter.
    s1 = None if rubric.safety_only else math.fsum(earned)
    return Scores(s1, s2, s3, Unresolved(math.fsum(open_weight), bonus, veto, errors))


def compare(a: Scores, b: Scores, *, resolution: float = 1e-6) -> Preference:
    """Which of two responses is better: fewer violations, then higher S1, then higher S2.

    Goes tier by tier over intervals: disjoint intervals decide, the same single point goes on to
    the next tier, anything else is unresolved. S1 is compared on a grid of step `resolution`, which
    keeps ties transitive where a pairwise tolerance would not (section 2, Ties).

    Raises:
        RubricError: one of the two comes from a safety-only rubric and the other does not, or
            `resolution` is finer than the arithmetic (1e-15) or no number.
    """
    if not _is_finite(resolution) or resolution < 1e-15:
        raise RubricError(f"resolution: found {resolution!r}, expected a number ≥ 1e-15")
    if (a.s1 is None) != (b.s1 is None):
        raise RubricError("s1: one response has no proficiency tier (safety_only), the other has")
    # Violations are bad, so their interval is negated: larger is better in every tier.
    tiers = [
        ((-a.s3 - a.unresolved.veto, -a.s3), (-b.s3 - b.unresolved.veto, -b.s3)),
        ((a.s2, a.s2 + a.unresolved.bonus), (b.s2, b.s2 + b.unresolved.bonus)),
    ]
    if a.s1 is not None and b.s1 is not None:

        def on_grid(s1: float, open_weight: float) -> tuple[int, int]:
            # s1 and the open weight are each rounded, their sum may be an ulp below what the same
            # verdicts would add up to; the upper end is stretched so that it is one.
            high = s1 if open_weight == 0 else (s1 + open_weight) * (1 + 1e-15)
            return round(s1 / resolution), round(high / resolution)

        tiers.insert(1, (on_grid(a.s1, a.unresolved.weight), on_grid(b.s1, b.unresolved.weight)))
    for (a_low, a_high), (b_low, b_high) in tiers:
        if a_low > b_high:
            return Preference.FIRST
        if b_low > a_high:
            return Preference.SECOND
        if not a_low == a_high == b_low == b_high:
            return Preference.UNRESOLVED
    return Preference.TIE


def reward(scores: Scores, spec: RewardSpec) -> float | None:
    """r = clip(S1 + α·S2, 0, 1+β) − λ·S3, at the worst end of what is unresolved (section 2).

    An abstained veto counts as violated; None if any judgment failed, so that a failure is never
    mistaken for a reward.

    Raises:
        RubricError: the rubric has no proficiency tier, so there is no S1.
    """
    if scores.s1 is None:
        raise RubricError("s1: a safety_only rubric has no S1 and so no reward")
    if scores.unresolved.errors:
        return None
    violations = scores.s3 + scores.unresolved.veto
    gain = min(max(scores.s1 + spec.alpha * scores.s2, 0.0), 1 + spec.beta)
    return gain - spec.lam * violations


def _is_finite(value: object) -> TypeGuard[float]:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond any float
        return False
