"""The loss against a slow, obvious twin on separate sequences, and against TRL's trainer."""

from __future__ import annotations

import copy
import itertools
import math
import random

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from trl import RewardConfig
from trl import RewardTrainer as TRLRewardTrainer

from promedical.reward_model.balance_rows import assign
from promedical.reward_model.instances import TrainingTree, Unit, training_trees, within_budget
from promedical.reward_model.loss import LossTerms, pack_training_trees, rubric_loss
from promedical.reward_model.model import TreeRewardModel
from promedical.reward_model.settings import TierWeights, TrainSettings
from promedical.reward_model.tree import Leaf, RowBudgetError, Tree, pack, paths
from tiny_reward import (
    ABSTAIN,
    ARCHITECTURES,
    MET,
    UNMET,
    criteria,
    load_renderer,
    random_rows,
    row,
    tiny_classifier,
)

TIERS = ("proficiency", "excellence", "veto", "overall")


def likelihoods(margin, ties, nu):
    """P(first better), P(second better), P(tie) as the papers write them, π = e^r."""
    first, second = torch.exp(margin), torch.ones(())
    if ties == "davidson":
        total = first + second + nu * torch.sqrt(first * second)
        return first / total, second / total, nu * torch.sqrt(first * second) / total
    theta = 1 + nu if ties == "rao_kupper" else 1.0
    better, worse = first / (first + theta * second), second / (second + theta * first)
    tie = (theta**2 - 1) * first * second / ((first + theta * second) * (second + theta * first))
    return better, worse, tie


def twin_loss(trees, score, *, mu, tier_weights, pair_weighting, ties="none", nu=1.0):
    """Section 4's formula, unit by unit, on a score for each (tree, leaf): sum and divisor."""
    total, units, pairs = torch.zeros(()), 0, 0
    for t, tree in enumerate(trees):
        for unit in tree.units:
            w = tier_weights.get(unit.tier, 1.0)
            sign = -1 if unit.tier == "veto" else 1
            pair_losses = [
                -torch.log(likelihoods(sign * score(t, a) - sign * score(t, b), ties, nu)[0])
                for a, b in unit.pairs
            ]
            if ties != "none":
                pair_losses += [
                    -torch.log(likelihoods(score(t, a) - score(t, b), ties, nu)[2])
                    for a, b in unit.ties
                ]
            point_losses = [
                -torch.log(torch.sigmoid(score(t, i) if true else -score(t, i)))
                for i, true in unit.points
            ]
            if pair_weighting == "pair":
                total = total + w * sum(pair_losses)
            else:
                if pair_losses:
                    total = total + w * sum(pair_losses) / len(pair_losses)
                if mu and point_losses:
                    total = total + w * mu * sum(point_losses) / len(point_losses)
            units += bool(pair_losses) or bool(mu and point_losses)
            pairs += len(pair_losses)
    return total, pairs if pair_weighting == "pair" else units


@st.composite
def training(draw: st.DrawFn) -> list[TrainingTree]:
    """Trees of arbitrary tokens whose units have arbitrary points and pairs."""
    trees = []
    for number in range(draw(st.integers(1, 3))):
        rng = random.Random(draw(st.integers(0, 10_000)))

        def tokens(low: int, high: int, rng: random.Random = rng) -> tuple[int, ...]:
            return tuple(rng.randrange(5, 400) for _ in range(rng.randint(low, high)))

        responses = tuple(tokens(1, 5) for _ in range(rng.randint(1, 3)))
        leaves, units = [], []
        for criterion in range(rng.randint(1, 4)):
            question = tokens(1, 4)
            asked = sorted(rng.sample(range(len(responses)), rng.randint(1, len(responses))))
            at = {r: len(leaves) + n for n, r in enumerate(asked)}
            leaves += [Leaf(r, criterion, question) for r in asked]
            truth = {r: rng.randint(0, 1) for r in asked}
            tier = rng.choice(TIERS)
            pairs = [(at[i], at[j]) for i in asked for j in asked if truth[i] > truth[j]]
            if tier == "veto":
                pairs = [pair[::-1] for pair in pairs]
            points = () if tier == "overall" else tuple((at[r], truth[r]) for r in asked)
            ties = () if tier == "overall" else itertools.combinations(asked, 2)
            ties = tuple((at[i], at[j]) for i, j in ties if truth[i] == truth[j])
            if points or pairs:
                units.append(Unit(tier, points, tuple(pairs), ties))
        trees.append(
            TrainingTree(f"t{number}", Tree(tokens(1, 6), responses, tuple(leaves)), tuple(units))
        )
    return trees


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(mine, theirs, relative=1e-4):
    assert mine.keys() == theirs.keys()
    for name in mine:
        distance = (mine[name] - theirs[name]).norm()
        assert distance <= relative * theirs[name].norm() + 1e-7, name


MODEL, TOKENIZER = None, None


def scorer():
    """One tiny model for the whole module; its gradients are cleared."""
    global MODEL
    if MODEL is None:
        MODEL = TreeRewardModel(tiny_classifier("llama", layers=2)[0])
    MODEL.zero_grad(set_to_none=True)
    return MODEL


def packed_loss(model, rows, *, order=None):
    """Loss and gradient as the trainer takes them: a backward for each row, one divisor."""
    items = max(1, sum(r.terms.items for r in rows))
    total = 0.0
    for r in rows if order is None else [rows[i] for i in order]:
        loss = model(r.row, r.terms, items)["loss"]
        loss.backward()
        total += float(loss.detach())
    return total


def smallest_budget(trees):
    """Tokens of the longest row that cannot be split: one path, or one pair."""
    return max(
        (
            len(t.tree.prompt)
            + sum(len(t.tree.responses[r]) for r in {t.tree.leaves[i].response for i in held})
            + sum(len(t.tree.leaves[i].tokens) for i in held)
            for t in trees
            for unit in t.units
            for held in [
                *map(set, unit.pairs),
                *map(set, unit.ties),
                *({i} for i, _ in unit.points),
            ]
        ),
        default=1,
    )


@settings(max_examples=40)
@given(
    training(),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from(["unit", "pair"]),
    st.fixed_dictionaries({}, optional={t: st.sampled_from([0.0, 0.5, 2.0]) for t in TIERS}),
    st.sampled_from(["none", "davidson", "rao_kupper"]),
    st.sampled_from([0, 3, 30, 10_000]),
    st.booleans(),
)
def test_equals_the_twin_on_separate_sequences(
    trees, mu, weighting, tier_weights, ties, extra, share_rows
):
    """Value and gradient, however the trees are split into rows or share them."""
    settings_ = {"mu": mu, "tier_weights": tier_weights, "pair_weighting": weighting}
    settings_ |= {"ties": ties, "nu": 0.7}
    model = scorer()
    budget = smallest_budget(trees) + extra
    rows, _ = pack_training_trees(trees, budget, share_rows=share_rows, **settings_)
    assert all(len(r.row) <= budget for r in rows)
    found = packed_loss(model, rows)
    mine = gradients(model)

    model.zero_grad(set_to_none=True)
    alone = {
        (t, i): model.model(input_ids=torch.tensor([path])).logits[0, 0]
        for t, tree in enumerate(trees)
        for i, path in enumerate(paths(tree.tree))
    }
    expected, divisor = twin_loss(trees, lambda t, i: alone[t, i], **settings_)
    assert sum(r.terms.items for r in rows) == pytest.approx(divisor, abs=1e-9)
    if not rows:
        assert divisor == 0
        return
    expected = expected / divisor
    assert found == pytest.approx(float(expected.detach()), rel=1e-5, abs=1e-6)
    if not expected.requires_grad or not mine:
        return
    expected.backward()
    assert_same_gradients(mine, gradients(model))


@settings(max_examples=15)
@given(
    training(),
    st.sampled_from(["unit", "pair"]),
    st.integers(0, 30),
    st.booleans(),
    st.integers(1, 3),
    st.randoms(use_true_random=False),
)
def test_packing_accumulation_and_processes_change_nothing(
    trees, weighting, extra, share_rows, processes, rng
):
    """As the trainer does: a divisor summed over processes, and gradients averaged over them."""
    model = scorer()
    whole, _ = pack_training_trees(trees, 10_000, pair_weighting=weighting)
    first = packed_loss(model, whole)
    once = gradients(model)

    split, _ = pack_training_trees(
        trees, smallest_budget(trees) + extra, pair_weighting=weighting, share_rows=share_rows
    )
    items = sum(r.terms.items for r in split)
    dealt = assign([len(r.row) for r in split], processes)
    second, mean = 0.0, {name: torch.zeros_like(g) for name, g in once.items()}
    for mine in dealt:
        model.zero_grad(set_to_none=True)
        rng.shuffle(mine)
        for i in mine:
            loss = model(split[i].row, split[i].terms, items)["loss"] * processes
            loss.backward()
            second += float(loss.detach()) / processes
        for name, g in gradients(model).items():
            mean[name] += g / processes
    assert second == pytest.approx(first, rel=1e-5, abs=1e-6)
    assert_same_gradients(mean, once)


@settings(max_examples=30)
@given(training(), st.integers(0, 20), st.booleans(), st.sampled_from(["unit", "pair"]))
def test_a_tree_split_over_steps_counts_in_each_by_what_the_step_reads(
    trees, extra, share_rows, weighting
):
    """At scores of zero every term loses log 2, so a unit's loss is known whatever part is read."""
    rows, _ = pack_training_trees(
        trees,
        smallest_budget(trees) + extra,
        pair_weighting=weighting,
        share_rows=share_rows,
    )
    units = [u for t in trees for u in t.units]
    kinds = {bool(u.pairs) + bool(u.points) for u in units}
    for r in rows:
        assert (r.terms.items > 0) == bool(r.terms.pairs or r.terms.points)
        step = float(rubric_loss(torch.zeros(len(r.row.leaves)), r.terms)) / r.terms.items
        terms = {1} if weighting == "pair" else kinds
        assert min(terms) - 1e-5 <= step / math.log(2) <= max(terms) + 1e-5


def test_splitting_happens_and_counts_every_term_once():
    trees = training_trees(random_rows(3, seed=1), load_renderer()).trees
    longest = max(len(p) for t in trees for p in paths(t.tree))
    whole, _ = pack_training_trees(trees, 10_000)
    split, packing = pack_training_trees(trees, longest + 60)
    assert packing.split_trees == 3
    assert len(split) > len(whole) == 3
    for rows in (whole, split):
        assert sum(len(r.terms.pairs) for r in rows) == sum(
            len(u.pairs) for t in trees for u in t.units
        )
        assert sum(len(r.terms.points) for r in rows) == sum(
            len(u.points) for t in trees for u in t.units
        )


# --- the formula on plain numbers -----------------------------------------------------------------


def test_a_violation_pushes_its_score_up_and_the_clean_answer_is_better():
    """s of the violating answer should rise (the sentence is true), s of the clean one fall."""
    (tree,) = training_trees(
        [row([[MET], [UNMET]], criteria(0, 0, 1))], load_renderer(), overall=False
    ).trees
    for mu in (0.0, 1.0):
        (only,), _ = pack_training_trees([tree], 10_000, mu=mu)
        scores = torch.zeros(2, requires_grad=True)
        rubric_loss(scores, only.terms).backward()
        violating, clean = (
            next(i for i, leaf in enumerate(only.row.leaves) if leaf.response == r) for r in (0, 1)
        )
        assert scores.grad[violating] < 0 < scores.grad[clean]
        assert only.terms.pairs == ((clean, violating, -1, 1.0),)


def test_without_terms_the_loss_is_zero_with_a_gradient():
    scores = torch.ones(3, requires_grad=True)
    loss = rubric_loss(scores, LossTerms((), (), 0))
    loss.backward()
    assert loss.item() == 0
    assert scores.grad.tolist() == [0, 0, 0]


def test_large_margins_stay_finite():
    scores = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = rubric_loss(scores, LossTerms(((1, 0, 1, 1.0),), ((0, 0, 1.0), (1, 1, 1.0)), 1))
    loss.backward()
    assert loss.item() == pytest.approx(4e4)
    assert torch.isfinite(scores.grad).all()


@pytest.mark.parametrize(("model", "tied"), [("davidson", 1e4), ("rao_kupper", 2e4)])
def test_large_margins_stay_finite_with_ties(model, tied):
    """A tie of far apart scores loses half the margin (Davidson) or all of it (Rao–Kupper)."""
    scores = torch.tensor([1e4, -1e4], requires_grad=True)
    terms = LossTerms(((1, 0, 1, 1.0),), (), 2, ((0, 1, 1.0),), model, 1.0)
    loss = rubric_loss(scores, terms)
    loss.backward()
    assert loss.item() == pytest.approx(2e4 + tied, rel=1e-4)
    assert torch.isfinite(scores.grad).all()


@settings(max_examples=50)
@given(st.floats(-8, 8), st.floats(0.05, 5), st.sampled_from(["davidson", "rao_kupper"]))
def test_a_better_a_worse_and_a_tie_exhaust_what_can_happen(margin, nu, model):
    scores = torch.tensor([margin, 0.0])
    better, worse = (
        float(torch.exp(-rubric_loss(scores, LossTerms((pair,), (), 1, (), model, nu))))
        for pair in ((0, 1, 1, 1.0), (1, 0, 1, 1.0))
    )
    ties = LossTerms((), (), 1, ((0, 1, 1.0),), model, nu)
    tie = float(torch.exp(-rubric_loss(scores, ties)))
    assert better + worse + tie == pytest.approx(1, abs=1e-5)
    assert (better, worse, tie) == pytest.approx(
        tuple(float(p) for p in likelihoods(torch.tensor(margin), model, nu)), abs=1e-5
    )
    at_equal_scores = float(torch.exp(-rubric_loss(torch.zeros(2), ties)))
    assert at_equal_scores == pytest.approx(nu / (2 + nu), abs=1e-5)


def test_ties_pull_scores_together_and_are_left_out_unless_asked_for():
    (tree,) = training_trees(
        [row([[MET], [MET]], criteria(0, 0, 1))], load_renderer(), overall=False, ties=True
    ).trees
    (plain,), _ = pack_training_trees([tree], 10_000)
    assert plain.terms.ties == ()
    assert pack_training_trees([tree], 10_000, mu=0.0)[0] == []
    (only,), _ = pack_training_trees([tree], 10_000, mu=0.0, ties="davidson")
    assert (only.terms.ties, only.terms.items) == (((0, 1, 1.0),), 1.0)
    scores = torch.tensor([2.0, 0.0], requires_grad=True)
    rubric_loss(scores, only.terms).backward()
    assert scores.grad[0] > 0 > scores.grad[1]


def test_half_precision_scores_are_summed_in_single():
    scores = torch.tensor([1.0, 0.0], dtype=torch.bfloat16)
    assert rubric_loss(scores, LossTerms(((0, 1, 1, 1.0),), (), 1)).dtype == torch.float32


def test_abstentions_make_no_term():
    trees = training_trees(
        [row([[MET, ABSTAIN, ABSTAIN, UNMET], [ABSTAIN, ABSTAIN, UNMET, UNMET]])], load_renderer()
    ).trees
    (only,), _ = pack_training_trees(trees, 10_000)
    assert only.terms.pairs == ()
    assert len(only.terms.points) == 4
    assert only.terms.items == pytest.approx(3)


def test_bad_settings_and_budgets_are_refused():
    trees = training_trees(random_rows(1), load_renderer()).trees
    with pytest.raises(ValueError, match="pair_weighting: found 'units'"):
        pack_training_trees(trees, 10_000, pair_weighting="units")
    with pytest.raises(ValueError, match="ties: found 'elo', expected one of none, davidson"):
        pack_training_trees(trees, 10_000, ties="elo")
    for nu in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="nu: found"):
            pack_training_trees(trees, 10_000, ties="davidson", nu=nu)
    name = trees[0].instruction_id
    with pytest.raises(RowBudgetError, match=f"'{name}'.*at most max_tokens = 20.*leave_out"):
        pack_training_trees(trees, 20)


def test_the_papers_loss_can_be_asked_for():
    """The mean over pairs of all tiers alike, and nothing else."""
    paper = TrainSettings(
        mu=0.0, pair_weighting="pair", tier_weights=TierWeights(veto=1, overall=1)
    )
    trees = training_trees(random_rows(4), load_renderer()).trees
    rows, _ = pack_training_trees(trees, 10_000, **paper.loss_terms())
    weights = {pair[3] for row in rows for pair in row.terms.pairs}
    pairs = sum(len(row.terms.pairs) for row in rows)
    assert weights == {1.0}
    assert sum(row.terms.items for row in rows) == pairs > 0
    assert not any(row.terms.points or row.terms.ties for row in rows)
    with pytest.raises(ValueError, match=r"mu: found 1\.0 beside pair_weighting: pair.*expected 0"):
        TrainSettings(pair_weighting="pair")


@given(st.integers(0, 2**16), st.integers(0, 200))
@settings(max_examples=25)
def test_what_is_too_long_is_left_out_and_the_rest_is_packed_as_before(seed, more):
    """Against the obvious twin: packing a tree that holds one pair, or one verdict, alone."""
    made = training_trees(random_rows(2, seed=seed), load_renderer(), ties=True)
    budget = min(len(path) for tree in made.trees for path in paths(tree.tree)) + more
    kept = within_budget(made, budget)

    def fits(tree, *leaves):
        try:
            pack([tree.tree], budget, [[leaves] if len(leaves) > 1 else []], [leaves])
        except RowBudgetError:
            return False
        return True

    expected, lost = {}, 0
    for tree in made.trees:
        units = []
        for unit in tree.units:
            points = [p for p in unit.points if fits(tree, p[0])]
            pairs = [p for p in unit.pairs if fits(tree, *p)]
            ties = [p for p in unit.ties if fits(tree, *p)]
            lost += len(unit.points + unit.pairs + unit.ties) - len(points + pairs + ties)
            if points or pairs or ties:
                units.append((unit.tier, points, pairs, ties))
        if units:
            expected[tree.instruction_id] = units
    found = {
        tree.instruction_id: [(u.tier, [*u.points], [*u.pairs], [*u.ties]) for u in tree.units]
        for tree in kept.trees
    }
    assert found == expected
    assert kept.counts["too_long_pairs"] + kept.counts["too_long_points"] == lost
    assert kept.counts["too_long_instructions"] == len(made.trees) - len(kept.trees)
    pack_training_trees(kept.trees, budget, ties="davidson")  # and nothing is too long any more


# --- TRL ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pair_weighting_is_trls_loss(architecture, tmp_path):
    """One step of TRL's RewardTrainer on the expanded pairs, veto pairs being turned round by o_c.

    TRL has no orientation: what it calls chosen has the larger s. For a veto that is the violating
    answer, because s is the log-odds that the violation is there.
    """
    model, tokenizer = tiny_classifier(architecture)
    trees = training_trees(random_rows(3, seed=2), load_renderer(ARCHITECTURES[architecture])).trees
    expanded = []
    for tree in trees:
        sequences = paths(tree.tree)
        for unit in tree.units:
            for better, worse in unit.pairs:
                higher, lower = (worse, better) if unit.tier == "veto" else (better, worse)
                expanded.append(
                    {"chosen_ids": list(sequences[higher]), "rejected_ids": list(sequences[lower])}
                )
    assert len(expanded) > 10

    theirs = copy.deepcopy(model)
    # What transformers reads at the end of a padded sequence must be the criterion's last token.
    pad = tokenizer.pad_token_id
    assert all(sequence[-1] != pad for pair in expanded for sequence in pair.values())
    trainer = TRLRewardTrainer(
        model=theirs,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(expanded),
        args=RewardConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=len(expanded),
            max_length=None,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
        ),
    )
    assert len(trainer.train_dataset) == len(expanded)
    (batch,) = trainer.get_train_dataloader()
    assert batch["input_ids"].shape[0] == 2 * len(expanded)
    assert theirs.config.pad_token_id == model.config.pad_token_id == pad
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()

    mine = TreeRewardModel(model)
    for budget in (10_000, 200):
        mine.zero_grad(set_to_none=True)
        # μ plays no part in the paper's formula.
        rows, packing = pack_training_trees(trees, budget, mu=7.0, pair_weighting="pair")
        assert sum(len(r.terms.pairs) for r in rows) == len(expanded)
        assert (packing.split_trees > 0) == (budget < 10_000)
        assert packed_loss(mine, rows) == pytest.approx(float(loss.detach()), abs=1e-5)
        assert_same_gradients(gradients(mine.model), gradients(theirs))
