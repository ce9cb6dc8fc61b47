"""The bench's metrics over (response, criterion) verdicts and over pairs (section 6).

Gold rows give three sets of items, built once: `Leaves` (a response and a criterion whose gold
verdict is resolved), within-criterion pairs (one criterion, two responses, different gold verdicts)
and overall pairs (two responses whose rubric, cut down to the criteria known in both, prefers one).
A grader's raw score s is the log-odds that the criterion's sentence is true; its oriented score is
r = o_c·s with o_c = −1 for a veto, so that larger r is the better response in every tier.

A leaf that a grader has no finite score for is unscored: counted, and never a verdict. What was
left out of the gold is counted on the item sets. Intervals and paired differences: `intervals`;
which figures are shown: `evaluate`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from promedical.bench import intervals
from promedical.bench.intervals import Floats, Ints, Statistic
from promedical.records import GradedInstruction
from promedical.rubric import Preference, Rubric, Scores, Tier, Verdict, compare, score

__all__ = [
    "BenchError",
    "Leaves",
    "OverallOutcomes",
    "OverallPairs",
    "ResponseVetoes",
    "Threshold",
    "WithinPairs",
    "fit_thresholds",
    "leaves",
    "orientation",
    "overall_from_scores",
    "overall_from_verdicts",
    "overall_pairs",
    "reliability",
    "response_vetoes",
    "within_credit",
    "within_pairs",
]

LeafKey = tuple[str, str, str]
ResponseKey = tuple[str, str]
Bools = NDArray[np.bool_]

RELIABILITY_BINS = 15
THRESHOLD_RULES: Mapping[Tier, str] = {
    Tier.PROFICIENCY: "balanced_accuracy",
    Tier.EXCELLENCE: "balanced_accuracy",
    Tier.VETO: "f1",
}


class BenchError(ValueError):
    """Rows or scores that cannot be evaluated; the message names the row and what was found."""


def orientation(tier: Tier) -> int:
    """o_c: −1 for a veto, whose sentence describes the violation, else +1 (section 4)."""
    return -1 if tier is Tier.VETO else 1


@dataclass(frozen=True)
class Leaves:
    """Every (response, criterion) of some rows whose gold verdict is resolved.

    Args:
        instruction_ids: of the rows, in order; the unit of the bootstrap.
        keys: [leaves], (instruction id, response id, criterion id).
        instruction: [leaves], index into `instruction_ids`.
        response: [leaves], running number of the response.
        tier: [leaves], tier of the criterion.
        positive: [leaves], whether the gold verdict is met (for a veto: violated).
        unknown: per tier, (response, criterion) without a resolved gold verdict, left out.
        n_responses: number of responses of the rows.
    """

    instruction_ids: tuple[str, ...]
    keys: tuple[LeafKey, ...]
    instruction: Ints
    response: Ints
    tier: NDArray[np.object_]
    positive: Bools
    unknown: Mapping[Tier, int]
    n_responses: int
    index: Mapping[LeafKey, int] = field(repr=False, compare=False, default_factory=dict)

    @property
    def n_instructions(self) -> int:
        """Number of rows."""
        return len(self.instruction_ids)

    def of(self, tier: Tier) -> Bools:
        """[leaves], whether a leaf is of that tier."""
        return np.array([t is tier for t in self.tier], dtype=np.bool_)

    def scores(self, scores: Mapping[LeafKey, float]) -> Floats:
        """[leaves], a grader's raw scores; NaN where it has none that is finite."""
        return _finite([scores.get(key) for key in self.keys])

    def scores_of_responses(self, overall: Mapping[ResponseKey, float]) -> Floats:
        """[leaves], s for a grader with one score a response, which must order every criterion.

        Its score is r, larger is better, so s = o_c·r.
        """
        r = _finite([overall.get(key[:2]) for key in self.keys])
        return r * np.array([orientation(t) for t in self.tier], dtype=np.float64)

    def verdicts(self, s: Floats, thresholds: Mapping[Tier, Threshold]) -> Floats:
        """[leaves], 1 met, 0 unmet, NaN unscored or no threshold for the tier."""
        cuts = [thresholds[t].value if t in thresholds else None for t in self.tier]
        cut = _finite(cuts)
        return np.where(np.isnan(s) | np.isnan(cut), np.nan, (s >= cut).astype(np.float64))


def _finite(values: Sequence[float | None]) -> Floats:
    numbers = np.array([np.nan if v is None else v for v in values], dtype=np.float64)
    return np.where(np.isfinite(numbers), numbers, np.nan)


def _rubric(row: GradedInstruction) -> Rubric:
    if row.rubric is None:
        raise BenchError(f"instruction {row.id!r}: rubric: found none, expected one")
    return row.rubric


def leaves(rows: Sequence[GradedInstruction]) -> Leaves:
    """Collect the resolved gold verdicts of graded rows.

    Raises:
        BenchError: no rows, an id that occurs twice, or a row without rubric.
    """
    if not rows:
        raise BenchError("rows: found none, expected at least one graded instruction")
    keys: list[LeafKey] = []
    instruction: list[int] = []
    response_number: list[int] = []
    tier: list[Tier] = []
    positive: list[bool] = []
    unknown = dict.fromkeys(Tier, 0)
    seen: set[str] = set()
    number = 0
    for i, row in enumerate(rows):
        if row.id in seen:
            raise BenchError(f"instruction {row.id!r} occurs twice, expected unique ids")
        seen.add(row.id)
        criteria = _rubric(row).criteria
        for response in row.responses:
            for criterion in criteria:
                verdict = response.verdicts.get(criterion.id)
                if verdict is None or not verdict.resolved:
                    unknown[criterion.tier] += 1
                    continue
                keys.append((row.id, response.id, criterion.id))
                instruction.append(i)
                response_number.append(number)
                tier.append(criterion.tier)
                positive.append(verdict is Verdict.MET)
            number += 1
    return Leaves(
        tuple(row.id for row in rows),
        tuple(keys),
        np.array(instruction, dtype=np.int64),
        np.array(response_number, dtype=np.int64),
        np.array(tier, dtype=object),
        np.array(positive, dtype=np.bool_),
        unknown,
        number,
        {key: i for i, key in enumerate(keys)},
    )


# --- thresholds -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Threshold:
    """Where a tier's scores are cut: met iff s ≥ value.

    Args:
        value: the cut; None if it could not be fitted, with the reason.
        rule: what it maximises on the calibration split.
        objective: the maximum reached there.
        n: calibration leaves used.
        unscored: calibration leaves without a score.
    """

    value: float | None
    rule: str
    objective: float | None
    n: int
    unscored: int
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The threshold as plain JSON types."""
        return dict(vars(self))


def fit_thresholds(calibration: Leaves, s: Floats) -> dict[Tier, Threshold]:
    """One threshold a tier: balanced accuracy for proficiency and excellence, F1 for veto.

    Candidates are the middles between neighbouring scores, and one below and one above all scores
    (all met, none met). Of equally good candidates the highest is taken.

    Args:
        calibration: leaves of the calibration split, which the bench shares no instruction with.
        s: [leaves], raw scores, NaN = unscored.
    """
    fitted = {}
    for tier, rule in THRESHOLD_RULES.items():
        of_tier = calibration.of(tier)
        scored = of_tier & ~np.isnan(s)
        n, unscored = int(scored.sum()), int(of_tier.sum() - scored.sum())
        positive = calibration.positive[scored]
        if positive.all() or not positive.any():
            reason = "only one gold class in calibration" if n else "no scored calibration leaf"
            fitted[tier] = Threshold(None, rule, None, n, unscored, reason)
            continue
        value, objective = _best_cut(s[scored], positive, rule)
        fitted[tier] = Threshold(value, rule, objective, n, unscored)
    return fitted


def _best_cut(s: Floats, positive: Bools, rule: str) -> tuple[float, float]:
    distinct = np.unique(s)
    middles = distinct[:-1] / 2 + distinct[1:] / 2
    # Two neighbouring floats have no middle; the upper one cuts between them.
    middles = np.where(middles > distinct[:-1], middles, distinct[1:])
    cuts = np.concatenate([[distinct[0] - 1], middles, [distinct[-1] + 1]])
    pos, neg = np.sort(s[positive]), np.sort(s[~positive])
    tp = (len(pos) - np.searchsorted(pos, cuts, "left")).astype(np.float64)
    fp = (len(neg) - np.searchsorted(neg, cuts, "left")).astype(np.float64)
    if rule == "f1":
        objective = 2 * tp / (len(pos) + tp + fp)
    else:
        objective = (tp / len(pos) + 1 - fp / len(neg)) / 2
    # Equal objectives may differ in the last bit.
    best = int(np.flatnonzero(objective >= objective.max() - 1e-12)[-1])
    return float(cuts[best]), float(objective[best])


# --- pairs on one criterion -----------------------------------------------------------------------


@dataclass(frozen=True)
class WithinPairs:
    """Pairs of responses to one prompt whose gold verdicts on one criterion differ.

    Args:
        better, worse: [pairs], indices into `Leaves`; better is the one with larger gold r: met, or
            for a veto not violated.
        instruction: [pairs].
        tier: [pairs].
    """

    better: Ints
    worse: Ints
    instruction: Ints
    tier: NDArray[np.object_]

    def of(self, tier: Tier) -> Bools:
        """[pairs], whether a pair is of that tier."""
        return np.array([t is tier for t in self.tier], dtype=np.bool_)


def within_pairs(gold: Leaves) -> WithinPairs:
    """All discordant pairs of the leaves."""
    groups: dict[tuple[str, str], list[int]] = {}
    for i, (instruction_id, _, criterion_id) in enumerate(gold.keys):
        groups.setdefault((instruction_id, criterion_id), []).append(i)
    better: list[int] = []
    worse: list[int] = []
    for group in groups.values():
        met = [i for i in group if gold.positive[i]]
        unmet = [i for i in group if not gold.positive[i]]
        for high, low in itertools.product(met, unmet):
            if orientation(gold.tier[high]) < 0:
                high, low = low, high
            better.append(high)
            worse.append(low)
    at = np.array(better, dtype=np.int64)
    return WithinPairs(at, np.array(worse, dtype=np.int64), gold.instruction[at], gold.tier[at])


def within_credit(gold: Leaves, pairs: WithinPairs, s: Floats) -> Floats:
    """[pairs], 1 if r(better) > r(worse), ½ if equal, else 0; NaN if either is unscored."""
    r = s * np.array([orientation(t) for t in gold.tier], dtype=np.float64)
    better, worse = r[pairs.better], r[pairs.worse]
    return _credit(better, worse)


def _credit(better: Floats, worse: Floats) -> Floats:
    credit = (better > worse) + (better == worse) / 2
    return np.where(np.isnan(better) | np.isnan(worse), np.nan, credit)


# --- overall preference ---------------------------------------------------------------------------


@dataclass(frozen=True)
class OverallPairs:
    """Pairs of responses of which the gold verdicts prefer one.

    Args:
        better, worse: [pairs], (instruction id, response id).
        instruction: [pairs].
        rubrics: [pairs], the rubric cut down to the criteria whose gold is known in both.
        considered: all pairs of responses of the rows.
        gold_ties, gold_unresolved: left out because the gold does not prefer either.
        no_known_proficiency: left out because no proficiency criterion is known in both.
    """

    better: tuple[ResponseKey, ...]
    worse: tuple[ResponseKey, ...]
    instruction: Ints
    rubrics: tuple[Rubric, ...]
    considered: int
    gold_ties: int
    gold_unresolved: int
    no_known_proficiency: int


def overall_pairs(rows: Sequence[GradedInstruction]) -> OverallPairs:
    """The overall gold preferences, over the criteria known in both responses (section 7.3)."""
    better: list[ResponseKey] = []
    worse: list[ResponseKey] = []
    instruction: list[int] = []
    rubrics: list[Rubric] = []
    counts = {Preference.TIE: 0, Preference.UNRESOLVED: 0}
    considered = no_known = 0
    cuts: dict[tuple[str, frozenset[str]], Rubric | None] = {}
    for i, row in enumerate(rows):
        rubric = _rubric(row)
        known = {
            r.id: frozenset(c for c, verdict in r.verdicts.items() if verdict.resolved)
            for r in row.responses
        }
        for a, b in itertools.combinations(row.responses, 2):
            considered += 1
            key = (row.id, known[a.id] & known[b.id])
            if key not in cuts:
                cuts[key] = rubric.restricted_to(key[1])
            cut = cuts[key]
            if cut is None:
                no_known += 1
                continue
            preference = compare(*(score(cut, _only(cut, r.verdicts)) for r in (a, b)))
            if preference in counts:
                counts[preference] += 1
                continue
            first, second = (a, b) if preference is Preference.FIRST else (b, a)
            better.append((row.id, first.id))
            worse.append((row.id, second.id))
            instruction.append(i)
            rubrics.append(cut)
    return OverallPairs(
        tuple(better),
        tuple(worse),
        np.array(instruction, dtype=np.int64),
        tuple(rubrics),
        considered,
        counts[Preference.TIE],
        counts[Preference.UNRESOLVED],
        no_known,
    )


def _only(rubric: Rubric, verdicts: Mapping[str, Verdict]) -> dict[str, Verdict]:
    return {c.id: verdicts[c.id] for c in rubric.criteria}


@dataclass(frozen=True)
class OverallOutcomes:
    """A grader's predictions on the overall pairs.

    Args:
        credit: [pairs], 1 right, 0 wrong, ½ tie or unresolved.
        ties, unresolved: number of pairs predicted so.
    """

    credit: Floats
    ties: int
    unresolved: int

    @property
    def counts(self) -> dict[str, int | float | None]:
        """Pairs right, wrong, tied, unresolved, and the share of the last two."""
        n = len(self.credit)
        half = self.ties + self.unresolved
        return {
            "right": int((self.credit == 1).sum()),
            "wrong": int((self.credit == 0).sum()),
            "tie": self.ties,
            "unresolved": self.unresolved,
            "half_credit_share": half / n if n else None,
        }


def overall_from_verdicts(gold: Leaves, pairs: OverallPairs, verdicts: Floats) -> OverallOutcomes:
    """Compare predicted verdicts of both responses under the pair's rubric.

    Args:
        verdicts: [leaves], 1, 0 or NaN. NaN counts as a failed judgment, so the pair is unresolved
            unless the others decide it.
    """
    credit = np.empty(len(pairs.rubrics))
    outcomes = dict.fromkeys(Preference, 0)
    memo: dict[tuple[int, ResponseKey], Scores] = {}

    def scored(rubric: Rubric, response: ResponseKey) -> Scores:
        key = (id(rubric), response)
        if key not in memo:
            memo[key] = score(
                rubric,
                {c.id: _verdict(verdicts[gold.index[(*response, c.id)]]) for c in rubric.criteria},
            )
        return memo[key]

    value = {Preference.FIRST: 1.0, Preference.SECOND: 0.0}
    for i, rubric in enumerate(pairs.rubrics):
        predicted = compare(scored(rubric, pairs.better[i]), scored(rubric, pairs.worse[i]))
        outcomes[predicted] += 1
        credit[i] = value.get(predicted, 0.5)
    return OverallOutcomes(credit, outcomes[Preference.TIE], outcomes[Preference.UNRESOLVED])


def _verdict(value: float) -> Verdict:
    if math.isnan(value):
        return Verdict.ERROR
    return Verdict.MET if value else Verdict.UNMET


def overall_from_scores(
    pairs: OverallPairs, overall: Mapping[ResponseKey, float]
) -> OverallOutcomes:
    """Compare one score a response; a pair with a missing score is unresolved."""
    better = _finite([overall.get(key) for key in pairs.better])
    worse = _finite([overall.get(key) for key in pairs.worse])
    credit = _credit(better, worse)
    unresolved = np.isnan(credit)
    ties = int((better == worse).sum())
    return OverallOutcomes(np.where(unresolved, 0.5, credit), ties, int(unresolved.sum()))


# --- veto by response -----------------------------------------------------------------------------


@dataclass(frozen=True)
class ResponseVetoes:
    """Responses with at least one known gold veto verdict.

    Args:
        positive: [responses], whether any of the known vetoes is violated.
        members: [responses], indices into `Leaves` of its known vetoes.
        instruction: [responses].
        left_out: responses with no known veto verdict.
    """

    positive: Bools
    members: tuple[Ints, ...]
    instruction: Ints
    left_out: int

    def predicted(self, verdicts: Floats) -> Floats:
        """[responses], 1 if any known veto is predicted violated, NaN if one that could be is not.

        That is: no predicted violation but an unscored veto leaves the response unscored.
        """
        flags = []
        for members in self.members:
            given = verdicts[members]
            if (given == 1).any():
                flags.append(1.0)
            else:
                flags.append(np.nan if np.isnan(given).any() else 0.0)
        return np.array(flags, dtype=np.float64)


def response_vetoes(gold: Leaves) -> ResponseVetoes:
    """Group the veto leaves by response; gold and prediction are over the known vetoes only."""
    groups: dict[int, list[int]] = {}
    for i in np.flatnonzero(gold.of(Tier.VETO)):
        groups.setdefault(int(gold.response[i]), []).append(int(i))
    members = tuple(np.array(g, dtype=np.int64) for g in groups.values())
    return ResponseVetoes(
        np.array([gold.positive[m].any() for m in members], dtype=np.bool_),
        members,
        np.array([gold.instruction[m[0]] for m in members], dtype=np.int64),
        gold.n_responses - len(members),
    )


# --- reliability ----------------------------------------------------------------------------------


def reliability(
    gold: Leaves, s: Floats, tier: Tier, *, bins: int = RELIABILITY_BINS
) -> tuple[dict[str, Any], Statistic]:
    """Bins of a reliability diagram and the expected calibration error (ECE) of one tier.

    p = σ(s). Bins hold equally many leaves as far as equal p stay together: a distinct p goes into
    the bin of the middle of its ranks, so fewer than `bins` may be left.
    ECE = Σ_bin n_bin/n · |mean p − share met|; it is biased upward when bins are small. Resamples
    keep the bins of the whole set.

    Returns:
        {"bins": [{"low", "high", "n", "confidence", "met"}], "n", "unscored"}, and the ECE.
    """
    scored = gold.of(tier) & ~np.isnan(s)
    unscored = int(gold.of(tier).sum() - scored.sum())
    # σ through tanh: no overflow at either end.
    p = 0.5 * (1 + np.tanh(s[scored] / 2))
    met = gold.positive[scored].astype(np.float64)
    n = len(p)
    if not n:
        return {"bins": [], "n": 0, "unscored": unscored}, intervals.undefined(
            "verdicts", "no items"
        )
    _, inverse, sizes = np.unique(p, return_inverse=True, return_counts=True)
    middle_rank = np.cumsum(sizes) - sizes / 2
    of_bin = (middle_rank / n * bins).astype(np.int64)[inverse]
    _, of_bin = np.unique(of_bin, return_inverse=True)  # number the occupied bins 0, 1, …
    k = int(of_bin.max()) + 1
    table = []
    for b in range(k):
        here = of_bin == b
        table.append(
            {
                "low": float(p[here].min()),
                "high": float(p[here].max()),
                "n": int(here.sum()),
                "confidence": float(p[here].mean()),
                "met": float(met[here].mean()),
            }
        )
    # Σ_bin n_bin/n·|mean p − mean y| = Σ_bin |Σ (p − y)| / n
    sums = np.zeros((n, k + 1))
    sums[np.arange(n), of_bin] = p - met
    sums[:, k] = 1

    def formula(t: Floats) -> Floats:
        gap: Floats = np.abs(t[:, :k]).sum(axis=1)
        return gap / t[:, k]

    ece = intervals.of_sums(
        sums, gold.instruction[scored], gold.n_instructions, formula, "verdicts", "no items"
    )
    return {"bins": table, "n": n, "unscored": unscored}, ece
