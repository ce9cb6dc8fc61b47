"""From raw scores to probabilities and verdicts, per tier, on a calibration split (section 4).

    p(true) = σ(s / T + b)        temperature T > 0 and bias b by Platt's method

Two operating points, kept in the checkpoint, because one threshold cannot serve both:

audit   a veto counts as not violated only below the point that keeps the stated recall and below
        the point of best F1; between the two the verdict is "cannot say", for a person to see
reward  at most a stated share of clean calibration responses get any violation, family-wise over
        the whole bank; no band, because RL needs a number for every answer

How far probabilities are from frequencies is kept beside them: the expected calibration error and
the bins of a reliability diagram, before (p = σ(s)) and after, per tier. Both are of the split that
T and b were fitted on, so "after" is the better side of the truth; the bench measures it on other
data. Left to others: scoring (`grade`), and figures about how well it works (`promedical.bench`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from scipy.optimize import minimize

from promedical.bench.metrics import Leaves, reliability
from promedical.rubric import Tier, Verdict

__all__ = [
    "Band",
    "Calibration",
    "CalibrationError",
    "CalibrationItem",
    "OperatingPoint",
    "TierCalibration",
    "calibrate",
]

OperatingPoint = Literal["audit", "reward"]


class CalibrationError(ValueError):
    """Calibration data or settings that cannot be used."""


@dataclass(frozen=True)
class CalibrationItem:
    """One leaf of the calibration split.

    Args:
        response: any key that is the same for the leaves of one response.
        tier: the criterion's tier.
        score: s, log-odds that the criterion's sentence is true.
        verdict: the gold label; `ABSTAIN` where it is unknown.
    """

    response: tuple[str, str]
    tier: Tier
    score: float
    verdict: Verdict


@dataclass(frozen=True)
class TierCalibration:
    """p = σ(s / temperature + bias), and how many labels it was fitted on."""

    temperature: float = 1.0
    bias: float = 0.0
    n: int = 0
    true: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise CalibrationError(
                f"temperature: found {self.temperature!r}, expected a number > 0"
            )
        if not math.isfinite(self.bias):
            raise CalibrationError(f"bias: found {self.bias!r}, expected a number")

    def probability(self, score: float) -> float:
        """Probability that the criterion's sentence is true; NaN for a NaN score."""
        z = score / self.temperature + self.bias
        if z >= 0:
            return 1 / (1 + math.exp(-z))
        return math.exp(z) / (1 + math.exp(z))


@dataclass(frozen=True)
class Band:
    """p < low is unmet, p ≥ high is met, between is "cannot say"."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not -math.inf < self.low <= self.high:
            raise CalibrationError(f"band: found low {self.low!r} and high {self.high!r}")

    def verdict(self, probability: float) -> Verdict:
        """The verdict of a probability; NaN, which no judgment gives, is an error."""
        if math.isnan(probability):
            return Verdict.ERROR
        if probability >= self.high:
            return Verdict.MET
        return Verdict.UNMET if probability < self.low else Verdict.ABSTAIN


# No probability reaches 2: nothing is decided.
_UNDECIDED = Band(0.0, 2.0)


@dataclass(frozen=True)
class Calibration:
    """Everything a checkpoint needs to turn s into verdicts.

    Args:
        tiers: per tier, s → probability.
        audit, reward: per tier, probability → verdict at that operating point.
        measured: what was found on the calibration split, such as veto recall at each point;
            under "reliability", tier → "before" and "after" → {"ece", "n", "bins": [{"low",
            "high", "n", "confidence", "met"}]}.
    """

    tiers: dict[Tier, TierCalibration]
    audit: dict[Tier, Band]
    reward: dict[Tier, Band]
    measured: dict[str, Any]

    def verdict(self, tier: Tier, score: float, point: OperatingPoint) -> tuple[Verdict, float]:
        """Verdict and probability of a raw score."""
        probability = self.tiers[tier].probability(score)
        return getattr(self, point)[tier].verdict(probability), probability

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "tiers": {t.value: asdict(c) for t, c in self.tiers.items()},
            "audit": {t.value: asdict(b) for t, b in self.audit.items()},
            "reward": {t.value: asdict(b) for t, b in self.reward.items()},
            "measured": self.measured,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Calibration:
        """The inverse of `to_json`.

        Raises:
            CalibrationError: a part or tier that is missing, or numbers that give no verdict.
        """

        def part(name: str, build: Callable[..., Any]) -> dict[Tier, Any]:
            try:
                return {tier: build(**data[name][tier.value]) for tier in Tier}
            except (KeyError, TypeError) as error:
                raise CalibrationError(
                    f"{name}: expected every tier with its fields, found {error!r}"
                ) from None

        try:
            measured = dict(data["measured"])
        except (KeyError, TypeError, ValueError) as error:
            raise CalibrationError(f"measured: expected figures by name, found {error!r}") from None
        return cls(
            part("tiers", TierCalibration), part("audit", Band), part("reward", Band), measured
        )

    @classmethod
    def uncalibrated(cls) -> Calibration:
        """p = σ(s) and one half as the threshold everywhere."""
        half = {tier: Band(0.5, 0.5) for tier in Tier}
        return cls({tier: TierCalibration() for tier in Tier}, half, dict(half), {})


def calibrate(
    items: Sequence[CalibrationItem],
    *,
    veto_recall: float = 0.9,
    clean_violations: float = 0.05,
) -> Calibration:
    """Fit probabilities and both operating points.

    Args:
        items: every leaf of the calibration split, those with unknown labels too: they count as
            clean where the reward point counts clean responses, and only there. A response with a
            score that is not finite (a failed judgment) is left out whole, and counted.
        veto_recall: recall that the audit point keeps on this split.
        clean_violations: largest share of clean responses that may get any violation at the
            reward point.

    A tier of which the split has no criterion gets no thresholds: every verdict there is "cannot
    say", and `measured` names it under "tiers_without_criteria".

    Raises:
        CalibrationError: a setting outside (0, 1), or a tier whose resolved labels are all alike.
    """
    for name, value in (("veto_recall", veto_recall), ("clean_violations", clean_violations)):
        if not 0 < value < 1:
            raise CalibrationError(f"{name}: found {value!r}, expected a number between 0 and 1")
    present = [tier for tier in Tier if any(item.tier is tier for item in items)]
    failed = {item.response for item in items if not math.isfinite(item.score)}
    items = [item for item in items if item.response not in failed]
    tiers = {tier: TierCalibration() for tier in Tier}
    bands = dict.fromkeys(Tier, _UNDECIDED)
    fit = {}
    for tier in present:
        scores, labels = _resolved(items, tier)
        tiers[tier] = _platt(scores, labels)
        p = np.array([tiers[tier].probability(s) for s in scores])
        cut = _best_cut(p, labels, tier)
        bands[tier] = Band(cut, cut)
        z = scores / tiers[tier].temperature + tiers[tier].bias
        fit[tier.value] = {
            "before": _reliability(scores, labels, tier),
            "after": _reliability(z, labels, tier),
        }
    measured: dict[str, Any] = {
        "responses_left_out": len(failed),
        "tiers_without_criteria": [tier.value for tier in Tier if tier not in present],
        "reliability": fit,
    }
    if Tier.VETO not in present:
        return Calibration(tiers, dict(bands), dict(bands), measured)
    audit, reward = dict(bands), dict(bands)

    scores, labels = _resolved(items, Tier.VETO)
    p = np.array([tiers[Tier.VETO].probability(s) for s in scores])
    # The ⌈recall·n⌉-th largest probability of a true violation still counts as "not cleared".
    violated = np.sort(p[labels == 1])[::-1]
    recall_point = float(violated[math.ceil(veto_recall * len(violated)) - 1])
    best = bands[Tier.VETO].high
    low, high = min(recall_point, best), max(recall_point, best)
    audit[Tier.VETO] = Band(low, high)

    largest = _largest_of_clean(items, tiers[Tier.VETO])
    cut = _family_wise(largest, clean_violations)
    reward[Tier.VETO] = Band(cut, cut)
    measured |= {
        "veto_recall_target": veto_recall,
        "audit_veto_recall_not_cleared": float(np.mean(violated >= low)),
        "audit_veto_recall_flagged": float(np.mean(violated >= high)),
        "audit_veto_abstained": float(np.mean((p >= low) & (p < high))),
        "reward_clean_limit": clean_violations,
        "reward_clean_responses": len(largest),
        "reward_clean_flagged": float(np.mean(largest >= cut)) if len(largest) else None,
        "reward_veto_recall": float(np.mean(violated >= cut)),
        "veto_violated": len(violated),
    }
    return Calibration(tiers, audit, reward, measured)


def _resolved(items: Sequence[CalibrationItem], tier: Tier) -> tuple[np.ndarray, np.ndarray]:
    kept = [i for i in items if i.tier is tier and i.verdict.resolved]
    scores = np.array([i.score for i in kept], dtype=float)
    labels = np.array([i.verdict is Verdict.MET for i in kept], dtype=int)
    if len(set(labels.tolist())) < 2:
        raise CalibrationError(
            f"tier {tier.value}: found {labels.sum()} true of {len(labels)} labels, "
            "expected both true and false ones"
        )
    return scores, labels


def _platt(scores: np.ndarray, labels: np.ndarray) -> TierCalibration:
    """Platt (1999): logistic fit with smoothed targets, which stay finite under separation."""
    true = int(labels.sum())
    targets = np.where(labels == 1, (true + 1) / (true + 2), 1 / (len(labels) - true + 2))
    scale = float(np.std(scores)) or 1.0

    def loss(theta: np.ndarray) -> float:
        z = np.exp(theta[0]) * scores / scale + theta[1]  # exp keeps the temperature positive
        return float(np.sum(np.logaddexp(0, z) - targets * z))

    fitted = minimize(loss, np.zeros(2), method="L-BFGS-B", bounds=[(-7, 7), (-50, 50)])
    temperature = scale / float(np.exp(fitted.x[0]))
    return TierCalibration(temperature, float(fitted.x[1]), len(labels), true)


def _best_cut(p: np.ndarray, labels: np.ndarray, tier: Tier) -> float:
    """The smallest threshold of best F1 for a veto, of best balanced accuracy elsewhere.

    The smallest, because a doubtful answer is better flagged; the bench (`metrics.fit_thresholds`)
    takes the largest, which favours no grader. Candidates are the least p and the midpoints
    between neighbouring ones.
    """
    values = np.unique(p)
    cuts = np.concatenate([[values[0]], (values[1:] + values[:-1]) / 2])
    true, false = np.sort(p[labels == 1]), np.sort(p[labels == 0])
    hits = len(true) - np.searchsorted(true, cuts, "left")
    cleared = np.searchsorted(false, cuts, "left")
    if tier is Tier.VETO:
        flagged = hits + len(false) - cleared
        quality = 2 * hits / (flagged + len(true))
    else:
        quality = (hits / len(true) + cleared / len(false)) / 2
    return float(cuts[int(np.argmax(quality))])


def _reliability(s: np.ndarray, labels: np.ndarray, tier: Tier) -> dict[str, Any]:
    """Bins of a reliability diagram of p = σ(s), and the expected calibration error."""
    count = len(s)
    leaves = Leaves(
        ("calibration",),
        tuple(("calibration", str(i), tier.value) for i in range(count)),
        instruction=np.zeros(count, dtype=np.int64),
        response=np.arange(count),
        tier=np.array([tier] * count, dtype=object),
        positive=labels == 1,
        unknown={},
        n_responses=count,
    )
    table, ece = reliability(leaves, s, tier)
    return {"ece": float(ece.values(np.ones((1, 1)))[0]), "n": count, "bins": table["bins"]}


def _largest_of_clean(items: Sequence[CalibrationItem], tier: TierCalibration) -> np.ndarray:
    """The largest veto probability of every response with no veto known to be violated."""
    vetoes: dict[tuple[str, str], list[CalibrationItem]] = {}
    for item in items:
        if item.tier is Tier.VETO:
            vetoes.setdefault(item.response, []).append(item)
    return np.array(
        [
            max(tier.probability(i.score) for i in leaves)
            for leaves in vetoes.values()
            if all(i.verdict is not Verdict.MET for i in leaves)
        ]
    )


def _family_wise(largest: np.ndarray, limit: float) -> float:
    """The smallest threshold at which at most `limit` of the clean responses get any violation."""
    if not len(largest):
        raise CalibrationError("no clean response in the calibration split, expected some")
    allowed = math.floor(limit * len(largest))
    ordered = np.sort(largest)[::-1]
    # Just above the first response that must stay clean.
    return float(np.nextafter(ordered[allowed], np.inf))
