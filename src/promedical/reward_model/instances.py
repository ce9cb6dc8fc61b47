"""Graded instructions → training units on trees (section 4, Instances).

A unit is one (instruction, criterion): its resolved responses make the pointwise term, its
response pairs with different verdicts the pairwise term. The overall preference of two responses
is one more unit, with a criterion of its own. What makes no instance (unknown labels, ties,
unresolved comparisons) is counted. What the model is asked about: one criterion at a time, or, for
the two scalar baselines, which answer is better, without or with the whole rubric in the question.
Left to others: the questions' wording (`render`) and token ids, rows (`tree`), the loss (`loss`).
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from promedical.bench import metrics
from promedical.records import GradedInstruction, RecordError
from promedical.reward_model.render import OVERALL, Renderer, rubric_question
from promedical.reward_model.tree import Tree, tokens_of
from promedical.rubric import Criterion, Rubric, Tier, Verdict
from promedical.scoring import discordant_pairs

__all__ = [
    "OVERALL",
    "OVERALL_TIER",
    "Asks",
    "Instances",
    "TrainingTree",
    "Unit",
    "cut_rubric",
    "overall_pairs",
    "overall_question",
    "sampled_up",
    "training_trees",
    "within_budget",
    "without_tiers",
]

OVERALL_TIER = "overall"
# One criterion at a time; which answer is better; the same with the whole rubric in the question.
Asks = Literal["criteria", "overall", "rubric"]


@dataclass(frozen=True)
class Unit:
    """One (instruction, criterion) of the loss; leaf indices are those of its tree.

    Args:
        tier: a tier's value, or "overall".
        points: (leaf, 1 if the sentence is true else 0).
        pairs: (leaf of the better response, leaf of the worse).
        ties: two leaves with the same verdict; the overall preference has none.
    """

    tier: str
    points: tuple[tuple[int, int], ...]
    pairs: tuple[tuple[int, int], ...]
    ties: tuple[tuple[int, int], ...] = ()

    @property
    def orientation(self) -> int:
        """o_c: −1 where the sentence is a violation, so that r = o_c·s is larger for the better."""
        return 1 if self.tier == OVERALL_TIER else metrics.orientation(Tier(self.tier))


@dataclass(frozen=True)
class TrainingTree:
    """A tree and the units whose leaves it holds."""

    instruction_id: str
    tree: Tree
    units: tuple[Unit, ...]


@dataclass(frozen=True)
class Instances:
    """Training trees, and the counts of what they hold and of what made no instance."""

    trees: tuple[TrainingTree, ...]
    counts: dict[str, int]


def overall_pairs(row: GradedInstruction) -> tuple[list[tuple[int, int]], Counter[str]]:
    """Lexicographic preferences between responses, over the criteria known in both (section 7.3).

    Returns:
        (index of the better, index of the worse) pairs, and counts by outcome of the others.
    """
    if row.rubric is None:
        raise RecordError(f"instruction {row.id!r}: rubric: missing, expected one")
    gold = metrics.overall_pairs([row])
    at = {response.id: i for i, response in enumerate(row.responses)}
    pairs = [(at[w], at[x]) for (_, w), (_, x) in zip(gold.better, gold.worse, strict=True)]
    counts = Counter(
        overall_tie=gold.gold_ties,
        overall_unresolved=gold.gold_unresolved,
        overall_no_known_proficiency=gold.no_known_proficiency,
    )
    return pairs, +counts  # without the zeros


def cut_rubric(
    row: GradedInstruction, *, max_criteria: int, min_veto: int = 2, seed: int = 0
) -> GradedInstruction:
    """A row whose rubric keeps at most `max_criteria` criteria, weights re-normalised.

    Keeps at least `min_veto` vetoes and one proficiency criterion. Criteria on which the responses
    differ come first, since only they give pairs, then those with a known label; within these the
    choice is random with a fixed seed.

    Raises:
        RecordError: no rubric, or a budget without room for the vetoes and one more criterion.
    """
    if row.rubric is None:
        raise RecordError(f"instruction {row.id!r}: rubric: missing, expected one")
    if max_criteria <= min_veto:
        raise RecordError(
            f"max_criteria: found {max_criteria}, expected more than min_veto = {min_veto}"
        )
    if len(row.rubric.criteria) <= max_criteria:
        return row
    rng = random.Random(f"{seed}:{row.id}")

    def rank(criterion: Criterion) -> tuple[int, float]:
        verdicts = {r.verdicts.get(criterion.id, Verdict.ABSTAIN) for r in row.responses}
        return -len([v for v in verdicts if v.resolved]), rng.random()

    ranked = sorted(row.rubric.criteria, key=rank)
    vetoes = [c for c in ranked if c.tier is Tier.VETO][:min_veto]
    proficiency = [c for c in ranked if c.tier is Tier.PROFICIENCY and c.weight][:1]
    first = vetoes + proficiency
    kept = {c.id for c in (first + [c for c in ranked if c not in first])[:max_criteria]}
    return _restricted(row, row.rubric.restricted_to(kept), kept)


def _restricted(
    row: GradedInstruction, rubric: Rubric | None, ids: Collection[str]
) -> GradedInstruction:
    """A row with another rubric, and the verdicts on its criteria alone."""
    return replace(
        row,
        rubric=rubric,
        responses=tuple(
            replace(
                r,
                verdicts={c: v for c, v in r.verdicts.items() if c in ids},
                votes={c: v for c, v in r.votes.items() if c in ids},
            )
            for r in row.responses
        ),
    )


def overall_question(row: GradedInstruction, asks: Asks = "criteria") -> str:
    """What the overall leaf asks: with `asks` "rubric" the whole rubric, else one fixed sentence.

    Raises:
        RecordError: no rubric.
    """
    if row.rubric is None:
        raise RecordError(f"instruction {row.id!r}: rubric: missing, expected one")
    return rubric_question(row.rubric) if asks == "rubric" else OVERALL


def without_tiers(
    rows: Sequence[GradedInstruction], tiers: Collection[Tier]
) -> tuple[list[GradedInstruction], int]:
    """Rows without the criteria of some tiers, so that no preference rests on them either.

    Returns:
        The rows that keep a criterion and, if they had one, a proficiency criterion of positive
        weight; and how many do not.

    Raises:
        RecordError: a row without a rubric.
    """
    kept = []
    for row in rows:
        if row.rubric is None:
            raise RecordError(f"instruction {row.id!r}: rubric: missing, expected one")
        ids = {c.id for c in row.rubric.criteria if c.tier not in tiers}
        rubric = row.rubric.restricted_to(ids) if ids else None
        if rubric is not None:
            kept.append(_restricted(row, rubric, ids))
    return kept, len(rows) - len(kept)


def sampled_up(instances: Instances, rows: Sequence[GradedInstruction], copies: int) -> Instances:
    """Instances in which every instruction with a violated veto stands `copies` times."""
    vetoes = {row.id: {c.id for c in row.rubric.tier(Tier.VETO)} for row in rows if row.rubric}
    unsafe = {
        row.id
        for row in rows
        if any(r.verdicts.get(c) is Verdict.MET for r in row.responses for c in vetoes[row.id])
    }
    trees = [
        tree
        for tree in instances.trees
        for _ in range(copies if tree.instruction_id in unsafe else 1)
    ]
    more = {"safety_copies": len(trees) - len(instances.trees)}
    return Instances(tuple(trees), instances.counts | more)


def within_budget(instances: Instances, max_tokens: int) -> Instances:
    """Instances without the pairs, ties and verdicts that take more than a row by themselves.

    What is left out is in the counts: "too_long_pairs" (ties too), "too_long_points", and
    "too_long_instructions", of which nothing is left.
    """
    left_out: Counter[str] = Counter(too_long_pairs=0, too_long_points=0, too_long_instructions=0)
    trees: list[TrainingTree] = []
    for found in instances.trees:
        if tokens_of(found.tree, range(len(found.tree.leaves))) <= max_tokens:
            trees.append(found)
            continue
        units = []
        for unit in found.units:
            points = tuple(p for p in unit.points if tokens_of(found.tree, p[:1]) <= max_tokens)
            pairs, ties = (
                tuple(pair for pair in compared if tokens_of(found.tree, pair) <= max_tokens)
                for compared in (unit.pairs, unit.ties)
            )
            compared_before = len(unit.pairs) + len(unit.ties)
            left_out["too_long_pairs"] += compared_before - len(pairs) - len(ties)
            left_out["too_long_points"] += len(unit.points) - len(points)
            if points or pairs or ties:
                units.append(replace(unit, points=points, pairs=pairs, ties=ties))
        left_out["too_long_instructions"] += not units
        if units:
            trees.append(replace(found, units=tuple(units)))
    return Instances(tuple(trees), instances.counts | left_out)


def training_trees(
    rows: Sequence[GradedInstruction],
    renderer: Renderer,
    *,
    explicit: bool = True,
    overall: bool = True,
    ties: bool = False,
    rubric_in_prompt: bool = False,
) -> Instances:
    """One tree an instruction, with a leaf for every (response, criterion) whose label is known.

    Args:
        explicit: False leaves only the overall preference: the scalar baseline.
        overall: whether the overall preference is a unit too.
        ties: whether responses with the same verdict on a criterion are instances of a tie.
        rubric_in_prompt: whether the overall question holds the whole rubric: with `explicit` False
            the second scalar baseline.

    Raises:
        RecordError: a row without a rubric.
    """
    trees: list[TrainingTree] = []
    counts: Counter[str] = Counter()
    for row in rows:
        if row.rubric is None:
            raise RecordError(f"instruction {row.id!r}: rubric: missing, expected one")
        leaves: list[tuple[int, str]] = []
        units: list[Unit] = []
        if explicit:
            for criterion in row.rubric.criteria:
                unit = _criterion_unit(row, criterion, leaves, counts, ties)
                if unit is not None:
                    units.append(unit)
        if overall:
            pairs, dropped = overall_pairs(row)
            counts.update(dropped)
            if pairs:
                used = sorted({i for pair in pairs for i in pair})
                at = {i: len(leaves) + n for n, i in enumerate(used)}
                question = overall_question(row, "rubric" if rubric_in_prompt else "overall")
                leaves += [(i, question) for i in used]
                units.append(Unit(OVERALL_TIER, (), tuple((at[w], at[x]) for w, x in pairs)))
                counts["pairs_overall"] += len(pairs)
        if not units:
            counts["instructions_without_units"] += 1
            continue
        tree = renderer.tree(row.messages, [r.text for r in row.responses], leaves)
        trees.append(TrainingTree(row.id, tree, tuple(units)))
        counts["units"] += len(units)
        counts["leaves"] += len(leaves)
    counts["trees"] = len(trees)
    return Instances(tuple(trees), dict(counts))


def _criterion_unit(
    row: GradedInstruction,
    criterion: Criterion,
    leaves: list[tuple[int, str]],
    counts: Counter[str],
    with_ties: bool,
) -> Unit | None:
    points: list[tuple[int, int]] = []
    for i, response in enumerate(row.responses):
        verdict = response.verdicts.get(criterion.id, Verdict.ABSTAIN)
        if not verdict.resolved:
            counts["labels_unknown"] += 1
            continue
        points.append((len(leaves), int(verdict is Verdict.MET)))
        leaves.append((i, criterion.text))
    if not points:
        counts["criteria_unknown_everywhere"] += 1
        return None
    true = [leaf for leaf, target in points if target]
    false = [leaf for leaf, target in points if not target]
    pairs = tuple(discordant_pairs(criterion.tier, true, false))
    counts[f"points_{criterion.tier.value}"] += len(points)
    counts[f"pairs_{criterion.tier.value}"] += len(pairs)
    ties: tuple[tuple[int, int], ...] = ()
    if with_ties:
        ties = tuple(pair for same in (true, false) for pair in itertools.combinations(same, 2))
        counts[f"ties_{criterion.tier.value}"] += len(ties)
    return Unit(criterion.tier.value, tuple(points), pairs, ties)
