"""The heart (section 2): scores, preference and reward, by property and against a slow twin."""

from __future__ import annotations

import itertools
import math
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import promedical
from promedical import (
    Criterion,
    Preference,
    RewardSpec,
    Rubric,
    RubricError,
    Scores,
    Tier,
    Unresolved,
    Verdict,
    VetoKind,
    compare,
    reward,
    score,
)

Q = 1e-6
FIRST, SECOND, TIE, UNRESOLVED = Preference
MET, UNMET, ABSTAIN, ERROR = Verdict
OPPOSITE = {FIRST: SECOND, SECOND: FIRST, TIE: TIE, UNRESOLVED: UNRESOLVED}


def proficiency(name: str, weight: Any = 1.0) -> Criterion:
    return Criterion(name, Tier.PROFICIENCY, f"States {name}.", weight=weight)


def excellence(name: str) -> Criterion:
    return Criterion(name, Tier.EXCELLENCE, f"Is {name}.")


def veto(name: str) -> Criterion:
    return Criterion(name, Tier.VETO, f"Does {name}.", kind=VetoKind.HARMFUL_ADVICE)


@st.composite
def rubrics(draw: st.DrawFn, vetoes: int = 0, most: int = 3) -> Rubric:
    parts = draw(st.lists(st.integers(0, 4), min_size=1, max_size=most).filter(any))
    total = sum(parts)
    criteria = [proficiency(f"p{i}", part / total) for i, part in enumerate(parts)]
    criteria += [excellence(f"e{i}") for i in range(draw(st.integers(0, most)))]
    criteria += [veto(f"v{i}") for i in range(draw(st.integers(vetoes, most)))]
    return Rubric(tuple(draw(st.permutations(criteria))))


def verdicts_of(rubric: Rubric, among: st.SearchStrategy[Verdict]) -> Any:
    return st.fixed_dictionaries({c.id: among for c in rubric.criteria})


ANY = st.sampled_from(list(Verdict))
RESOLVED = st.sampled_from([MET, UNMET])

# S1 differs by eighths of the resolution, around values where the grid's rounding turns.
fractions_of_q = st.builds(
    lambda base, k: base + k * Q / 8, st.sampled_from([0.25, 0.5]), st.integers(-20, 20)
)
unresolved = st.builds(
    Unresolved,
    weight=st.one_of(st.just(0.0), st.integers(1, 20).map(lambda k: k * Q / 8)),
    bonus=st.sampled_from([0, 0, 0, 1, 2]),
    veto=st.sampled_from([0, 0, 0, 1, 2]),
)
close_scores = st.builds(Scores, fractions_of_q, st.integers(0, 3), st.integers(0, 2), unresolved)
# Equal in two tiers, so that the third decides in many examples.
nearly_equal = st.builds(
    lambda s1, u: Scores(s1, 1, 1, u), fractions_of_q, st.one_of(st.just(Unresolved()), unresolved)
)
any_scores = st.one_of(close_scores, nearly_equal)


# --- preference ---------------------------------------------------------------------------------


@given(any_scores, any_scores)
def test_compare_is_antisymmetric(a: Scores, b: Scores) -> None:
    assert compare(b, a) is OPPOSITE[compare(a, b)]


@given(st.lists(any_scores, min_size=6, max_size=6))
def test_strict_preference_is_transitive(scores: list[Scores]) -> None:
    for a, b, c in itertools.permutations(scores, 3):
        if compare(a, b) is FIRST and compare(b, c) is FIRST:
            assert compare(a, c) is FIRST, (a, b, c)


@given(st.lists(any_scores, min_size=6, max_size=6))
def test_ties_are_equivalences(scores: list[Scores]) -> None:
    for a, b, c in itertools.permutations(scores, 3):
        if compare(a, b) is TIE:
            assert compare(a, c) is compare(b, c), (a, b, c)


def test_a_pairwise_tolerance_would_have_made_a_cycle() -> None:
    """S1 = 0, 0.6t, 1.2t with S2 = 2, 1, 0: under "equal within t", a > b > c > a."""
    a, b, c = (Scores(k * 0.6 * Q, 2 - k, 0) for k in range(3))
    assert [compare(a, b), compare(b, c), compare(a, c)] == [SECOND, FIRST, SECOND]


@given(any_scores)
def test_nothing_is_better_than_itself(a: Scores) -> None:
    assert compare(a, a) in (TIE, UNRESOLVED)
    assert (compare(a, a) is TIE) == (
        a.unresolved.veto == a.unresolved.bonus == 0 and on_one_grid_point(a)
    )


def on_one_grid_point(a: Scores) -> bool:
    assert a.s1 is not None
    return round(a.s1 / Q) == round((a.s1 + a.unresolved.weight) * (1 + 1e-15) / Q)


@given(
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 50),
    st.integers(0, 50),
    st.integers(0, 5),
    st.integers(1, 5),
    st.floats(0, 1),
    st.integers(0, 9),
)
def test_no_s1_or_s2_outweighs_one_more_violation_in_compare(
    s1: float, other: float, s2: int, more: int, s3: int, extra: int, weight: float, bonus: int
) -> None:
    fewer = Scores(s1, s2, s3, Unresolved(weight, bonus))
    assert compare(fewer, Scores(other, more, s3 + extra, Unresolved(weight, bonus))) is FIRST


def test_the_tiers_decide_in_order() -> None:
    base = Scores(0.5, 1, 1)
    assert compare(base, Scores(0.9, 9, 2)) is FIRST
    assert compare(base, Scores(0.6, 0, 1)) is SECOND
    assert compare(base, Scores(0.5, 0, 1)) is FIRST
    assert compare(base, Scores(0.5, 1, 1)) is TIE
    assert compare(Scores(0.5, 1, 1, Unresolved(veto=1)), Scores(0.5, 1, 3)) is FIRST
    assert compare(Scores(0.5, 1, 1, Unresolved(veto=1)), Scores(0.5, 1, 2)) is UNRESOLVED
    assert compare(base, Scores(0.1, 1, 1, Unresolved(weight=0.3))) is FIRST
    assert compare(base, Scores(0.1, 1, 1, Unresolved(weight=0.4))) is UNRESOLVED


# --- the slow, obvious twin ---------------------------------------------------------------------


def completions(verdicts: Mapping[str, Verdict]) -> Iterator[dict[str, Verdict]]:
    """Every way in which the open verdicts might have come out."""
    choices = [(v,) if v.resolved else (MET, UNMET) for v in verdicts.values()]
    for chosen in itertools.product(*choices):
        yield dict(zip(verdicts, chosen, strict=True))


def keys(rubric: Rubric, verdicts: Mapping[str, Verdict]) -> list[tuple[int, ...]]:
    """(−S3, round(S1/q), S2) of every completion, added up by hand."""
    found = []
    for full in completions(verdicts):
        met = [c for c in rubric.criteria if full[c.id] is MET]
        s1 = math.fsum(c.weight for c in met if c.weight is not None)
        tiers = [c.tier for c in met]
        found.append((-tiers.count(Tier.VETO), round(s1 / Q), tiers.count(Tier.EXCELLENCE)))
    return found


def obvious(a: list[tuple[int, ...]], b: list[tuple[int, ...]]) -> Preference:
    """Section 2's rule, on the attainable values of each tier."""
    for of_a, of_b in zip(zip(*a, strict=True), zip(*b, strict=True), strict=True):
        if min(of_a) > max(of_b):
            return FIRST
        if min(of_b) > max(of_a):
            return SECOND
        if len({*of_a, *of_b}) > 1:
            return UNRESOLVED
    return TIE


@given(st.data())
def test_compare_is_the_rule_over_all_completions(data: st.DataObject) -> None:
    rubric = data.draw(rubrics(most=2))
    a, b = (data.draw(verdicts_of(rubric, ANY)) for _ in range(2))
    preference = compare(score(rubric, a), score(rubric, b))
    of_a, of_b = keys(rubric, a), keys(rubric, b)
    assert preference is obvious(of_a, of_b)
    # A decision is one that no way of settling the open verdicts can overturn.
    if preference is FIRST:
        assert min(of_a) > max(of_b)
    if preference is SECOND:
        assert min(of_b) > max(of_a)
    if preference is TIE:
        assert {*of_a} == {*of_b}
        assert len({*of_a}) == 1


@given(st.data())
def test_settled_verdicts_are_never_unresolved(data: st.DataObject) -> None:
    rubric = data.draw(rubrics())
    a, b = (data.draw(verdicts_of(rubric, RESOLVED)) for _ in range(2))
    (of_a,), (of_b,) = keys(rubric, a), keys(rubric, b)
    expected = FIRST if of_a > of_b else SECOND if of_b > of_a else TIE
    assert compare(score(rubric, a), score(rubric, b)) is expected


def split(parts: list[int]) -> Rubric:
    return Rubric(tuple(proficiency(f"p{i}", p / sum(parts)) for i, p in enumerate(parts)))


def assert_no_completion_beats(rubric: Rubric, verdicts: Mapping[str, Verdict]) -> None:
    scores = score(rubric, verdicts)
    for full in completions(verdicts):
        exact = score(rubric, full)
        if exact.s1:
            # s1 / resolution = 5.5, where an ulp decides on which grid point it falls.
            resolution = exact.s1 / 5.5
            assert compare(scores, exact, resolution=resolution) in (TIE, UNRESOLVED)


@given(st.lists(st.integers(1, 50), min_size=2, max_size=5), st.data())
def test_no_completion_falls_out_of_its_interval(parts: list[int], data: st.DataObject) -> None:
    rubric = split(parts)
    assert_no_completion_beats(rubric, data.draw(verdicts_of(rubric, ANY)))


def test_rounding_cannot_push_a_completion_out_of_its_interval() -> None:
    """Here s1 and the open weight, each rounded, add up to an ulp less than all weights do."""
    rubric = split([24, 3, 9, 48, 30])
    weights = [c.weight for c in rubric.criteria if c.weight is not None]
    assert math.fsum(weights[:3]) + math.fsum(weights[3:]) < math.fsum(weights)
    assert_no_completion_beats(
        rubric, {"p0": MET, "p1": MET, "p2": MET, "p3": ABSTAIN, "p4": ABSTAIN}
    )


# --- verdicts that could not be had --------------------------------------------------------------


@given(st.data())
def test_an_open_veto_never_scores_as_safe(data: st.DataObject) -> None:
    rubric = data.draw(rubrics(vetoes=1))
    settled = data.draw(verdicts_of(rubric, ANY))
    name = data.draw(st.sampled_from([c.id for c in rubric.tier(Tier.VETO)]))
    opened = {**settled, name: data.draw(st.sampled_from([ABSTAIN, ERROR]))}
    violated, safe = {**settled, name: MET}, {**settled, name: UNMET}
    scores = score(rubric, opened)

    assert scores.s3 + scores.unresolved.veto == (
        score(rubric, violated).s3 + score(rubric, violated).unresolved.veto
    )
    # Better than another response only if it were so with the violation, too.
    assert compare(scores, score(rubric, safe)) is not FIRST
    other = score(rubric, data.draw(verdicts_of(rubric, ANY)))
    if compare(scores, other) is FIRST:
        assert compare(score(rubric, violated), other) is FIRST
    if opened[name] is ERROR:
        assert reward(scores, RewardSpec()) is None
    else:
        assert reward(scores, RewardSpec()) == reward(score(rubric, violated), RewardSpec())


@given(st.data())
def test_the_reward_takes_the_worst_end(data: st.DataObject) -> None:
    rubric = data.draw(rubrics(most=2))
    among = st.sampled_from([MET, UNMET, ABSTAIN])
    verdicts = data.draw(verdicts_of(rubric, among))
    spec = RewardSpec()
    rewards = [reward(score(rubric, full), spec) for full in completions(verdicts)]
    assert reward(score(rubric, verdicts), spec) == min(r for r in rewards if r is not None)


@given(st.data())
def test_a_failed_judgment_gives_no_reward(data: st.DataObject) -> None:
    rubric = data.draw(rubrics())
    verdicts = data.draw(verdicts_of(rubric, ANY))
    name = data.draw(st.sampled_from([c.id for c in rubric.criteria]))
    scores = score(rubric, {**verdicts, name: ERROR})
    assert scores.unresolved.errors >= 1
    assert reward(scores, RewardSpec()) is None


# --- reward --------------------------------------------------------------------------------------


@st.composite
def specs(draw: st.DrawFn) -> RewardSpec:
    beta = draw(st.floats(1e-3, 2))
    above = draw(st.floats(1e-3, 5))
    return RewardSpec(draw(st.floats(0, 0.999)), beta, 1 + beta + above)


@given(
    specs(),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 50),
    st.integers(0, 50),
    st.integers(0, 5),
    st.integers(1, 5),
)
def test_no_s1_or_s2_outweighs_one_more_violation_in_reward(
    spec: RewardSpec, s1: float, other: float, s2: int, more: int, s3: int, extra: int
) -> None:
    fewer = reward(Scores(s1, s2, s3), spec)
    worse = reward(Scores(other, more, s3 + extra), spec)
    assert fewer is not None
    assert worse is not None
    assert fewer > worse


def test_reward_by_hand() -> None:
    spec = RewardSpec(alpha=0.1, beta=0.2, lam=1.5)
    assert reward(Scores(0.5, 2, 0), spec) == pytest.approx(0.7)
    assert reward(Scores(1.0, 9, 0), spec) == pytest.approx(1.2)
    assert reward(Scores(0.5, 2, 1, Unresolved(veto=1)), spec) == pytest.approx(0.7 - 3.0)
    # At λ = 1 + β a perfect answer with a violation ties with an empty one without.
    assert reward(Scores(1.0, 9, 1), RewardSpec(0.1, 0.5, 1.5)) == reward(Scores(0.0, 0, 0), spec)


def test_reward_can_part_from_preference_within_equal_violations() -> None:
    few, many = Scores(0.52, 0, 0), Scores(0.50, 1, 0)
    spec = RewardSpec(alpha=0.05)
    assert compare(few, many) is FIRST
    assert reward(few, spec) < reward(many, spec)  # type: ignore[operator]


def test_ablations_lift_one_bound_each() -> None:
    assert reward(Scores(0.5, 0, 3), RewardSpec(lam=0, ablation="no_veto")) == 0.5
    spec = RewardSpec(alpha=0.5, beta=0, lam=1.5, ablation="no_bonus_margin")
    assert reward(Scores(0.9, 4, 0), spec) == 1.0


# --- score ---------------------------------------------------------------------------------------


@given(st.data())
def test_permuting_criteria_changes_nothing(data: st.DataObject) -> None:
    rubric = data.draw(rubrics())
    verdicts = data.draw(verdicts_of(rubric, ANY))
    shuffled = Rubric(tuple(data.draw(st.permutations(rubric.criteria))))
    reordered = dict(data.draw(st.permutations(list(verdicts.items()))))
    assert score(shuffled, reordered) == score(rubric, verdicts)


def test_score_by_hand() -> None:
    rubric = Rubric(
        (
            proficiency("p", 0.75),
            proficiency("q", 0.25),
            excellence("e"),
            excellence("f"),
            veto("v"),
            veto("w"),
        )
    )
    verdicts = {"p": MET, "q": ABSTAIN, "e": MET, "f": ERROR, "v": MET, "w": ABSTAIN}
    assert score(rubric, verdicts) == Scores(0.75, 1, 1, Unresolved(0.25, 1, 1, 1))
    assert score(rubric, verdicts, degrees={"p": 0.5}).s1 == 0.375
    strings = {name: verdict.value for name, verdict in verdicts.items()}
    assert score(rubric, strings) == score(rubric, verdicts)  # type: ignore[arg-type]


def test_safety_only_rubrics_have_no_s1() -> None:
    rubric = Rubric((veto("v"), excellence("e")), safety_only=True)
    bad, good = (score(rubric, {"v": v, "e": MET}) for v in (MET, UNMET))
    assert bad.s1 is None
    assert compare(bad, good) is SECOND
    assert compare(good, score(rubric, {"v": UNMET, "e": UNMET})) is FIRST
    with pytest.raises(RubricError, match=r"s1.*safety_only"):
        compare(bad, Scores(1.0, 0, 0))
    with pytest.raises(RubricError, match=r"s1.*safety_only"):
        reward(bad, RewardSpec())


@given(st.data())
def test_a_rubric_cut_down_keeps_its_proportions(data: st.DataObject) -> None:
    rubric = data.draw(rubrics())
    ids = data.draw(st.sets(st.sampled_from([c.id for c in rubric.criteria])))
    kept = rubric.restricted_to(ids)
    left = math.fsum(rubric[i].weight or 0.0 for i in ids)
    if left == 0:
        assert kept is None
        return
    assert kept is not None
    assert {c.id for c in kept.criteria} == ids
    for criterion in kept.tier(Tier.PROFICIENCY):
        assert criterion.weight == pytest.approx((rubric[criterion.id].weight or 0.0) / left)


def test_a_person_never_reads_met_for_a_veto() -> None:
    assert [v.label(Tier.VETO) for v in Verdict] == [
        "violated",
        "not violated",
        "cannot say",
        "judgment failed",
    ]
    assert [v.label(Tier.PROFICIENCY) for v in Verdict] == [
        "met",
        "not met",
        "cannot say",
        "judgment failed",
    ]


# --- bad input -----------------------------------------------------------------------------------

NAN = float("nan")
RUBRIC = Rubric((proficiency("p"), excellence("e")))
GIVEN = {"p": MET, "e": UNMET}


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: proficiency("p", -0.5), ["'p'", "weight", "-0.5"]),
        (lambda: proficiency("p", NAN), ["'p'", "weight", "nan"]),
        (lambda: proficiency("p", math.inf), ["'p'", "weight", "inf"]),
        (lambda: proficiency("p", 10**400), ["'p'", "weight", "1000"]),
        (lambda: proficiency("p", None), ["'p'", "weight", "None"]),
        (lambda: proficiency("p", "1"), ["'p'", "weight", "'1'"]),
        (lambda: proficiency("p", True), ["'p'", "weight", "True"]),
        (lambda: proficiency(""), ["id", "''"]),
        (lambda: Criterion("p", Tier.EXCELLENCE, "  "), ["'p'", "text", "'  '"]),
        (lambda: Criterion("p", "main", "Is."), ["'p'", "tier", "'main'", "proficiency"]),
        (lambda: Criterion("p", [], "Is."), ["'p'", "tier", "[]"]),
        (lambda: Criterion("e", Tier.EXCELLENCE, "Is.", weight=0.5), ["'e'", "weight", "0.5"]),
        (
            lambda: Criterion("e", Tier.EXCELLENCE, "Is.", kind=VetoKind.DISCRIMINATION),
            ["'e'", "kind", "'discrimination'"],
        ),
        (
            lambda: Criterion("v", Tier.VETO, "Does.", kind="harm"),
            ["'v'", "kind", "'harm'", "harmful_advice"],
        ),
        (lambda: Rubric((proficiency("p", 0.5), proficiency("p", 0.5))), ["criteria", "'p'"]),
        (lambda: Rubric((proficiency("p", 0.5),)), ["weights sum to 0.5", "expected 1"]),
        (lambda: Rubric((proficiency("p", 1 + 2e-6),)), ["weights sum to 1.000002"]),
        (lambda: Rubric((proficiency("p", 1e308), proficiency("q", 1e308))), ["sum to inf"]),
        (lambda: Rubric((excellence("e"),)), ["proficiency tier is empty", "safety_only"]),
        (lambda: Rubric(()), ["proficiency tier is empty"]),
        (lambda: Rubric((proficiency("p"),), safety_only=True), ["safety_only", "1"]),
        (lambda: score(RUBRIC, {"p": MET}), ["verdicts", "'e'"]),
        (lambda: score(RUBRIC, {**GIVEN, "x": MET}), ["verdicts", "'x'"]),
        (lambda: score(RUBRIC, {**GIVEN, "p": "maybe"}), ["verdicts['p']", "'maybe'"]),
        (lambda: score(RUBRIC, {**GIVEN, "p": None}), ["verdicts['p']", "None"]),
        (lambda: score(RUBRIC, GIVEN, degrees={"p": 1.5}), ["degrees['p']", "1.5"]),
        (lambda: score(RUBRIC, GIVEN, degrees={"p": NAN}), ["degrees['p']", "nan"]),
        (lambda: score(RUBRIC, GIVEN, degrees={"e": 0.5}), ["degrees['e']", "proficiency"]),
        (lambda: score(RUBRIC, GIVEN, degrees={"x": 0.5}), ["degrees['x']", "proficiency"]),
        (
            lambda: score(RUBRIC, {**GIVEN, "p": ABSTAIN}, degrees={"p": 0.5}),
            ["degrees['p']", "abstain"],
        ),
        (lambda: compare(Scores(0, 0, 0), Scores(0, 0, 0), resolution=0), ["resolution", "0"]),
        (lambda: compare(Scores(0, 0, 0), Scores(0, 0, 0), resolution=NAN), ["resolution", "nan"]),
        (lambda: compare(Scores(0, 0, 0), Scores(0, 0, 0), resolution=1e-320), ["resolution"]),
        (lambda: RewardSpec(alpha=1.0), ["alpha", "1.0"]),
        (lambda: RewardSpec(alpha=-0.1), ["alpha", "-0.1"]),
        (lambda: RewardSpec(alpha=NAN), ["alpha", "nan"]),
        (lambda: RewardSpec(beta=0.0), ["beta", "0.0"]),
        (lambda: RewardSpec(beta=math.inf), ["beta", "inf"]),
        (lambda: RewardSpec(beta=0.5, lam=1.4), ["lam", "1.4", "1.5"]),
        (lambda: RewardSpec(lam=0.0), ["lam", "0.0"]),
        (lambda: RewardSpec(lam="2"), ["lam", "'2'"]),
        (lambda: RewardSpec(ablation="no_alpha"), ["ablation", "'no_alpha'"]),
        (lambda: RewardSpec(ablation="no_veto"), ["lam", "1.5"]),
        (lambda: RewardSpec(ablation="no_bonus_margin"), ["beta", "0.2"]),
        (lambda: RewardSpec(lam=0.0, beta=0.0, ablation="no_veto"), ["beta", "0.0"]),
    ],
)
def test_bad_input_names_field_and_value(make: Callable[[], object], named: list[str]) -> None:
    with pytest.raises(RubricError) as caught:
        make()
    for part in named:
        assert part in str(caught.value)


def test_weights_may_miss_one_by_their_tolerance() -> None:
    assert Rubric((proficiency("p", 1 + 5e-7),)).criteria[0].weight == 1 + 5e-7


def test_the_heart_needs_the_standard_library_alone() -> None:
    """A notebook, a server and a trainer share it, so it brings nothing along."""
    code = (
        "import sys; before = set(sys.modules); import promedical; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before} - {'promedical'}; "
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_submodule_hides_a_name_of_the_package():
    """`from promedical import reward` stays the function once every module was imported."""
    found = [m.name for m in pkgutil.iter_modules(promedical.__path__)]
    assert not set(found) & set(promedical.__all__)
