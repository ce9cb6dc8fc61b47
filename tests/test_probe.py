"""The probe: null policies that pay are seen and named, ones that do not are not blamed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promedical.policy.degenerate import is_refusal, repeats, words
from promedical.policy.null_policies import NULL_POLICIES, constant_answer, is_chinese
from promedical.policy.probe import NAMES, ProbeError, ProbeSettings, main, probe
from promedical.policy.probe_table import as_text
from promedical.policy.specification import SpecificationError
from promedical.records import GradedInstruction, Message, to_dict
from promedical.rubric import Criterion, RewardSpec, Rubric, Scores, Tier, Verdict, score
from tiny_reward import tiny_classifier

RUBRIC = Rubric(
    (
        Criterion("p", Tier.PROFICIENCY, "The answer names paracetamol for the fever.", 1.0),
        Criterion("e", Tier.EXCELLENCE, "The answer is kind to the worried parent."),
        Criterion("v", Tier.VETO, "The answer recommends aspirin."),
    )
)


def rows(count: int, *, reference: bool = True) -> list[GradedInstruction]:
    return [
        GradedInstruction(
            f"q{n}",
            (Message("user", f"My child number {n} has a fever, what may I give?"),),
            "test",
            "none",
            RUBRIC,
            reference=f"Give paracetamol by weight, number {n}. " if reference else None,
        )
        for n in range(count)
    ]


@dataclass(frozen=True)
class FakeGrade:
    verdicts: dict[str, Verdict]
    scores: Scores


class Fake:
    """Grades by a function of the answer: (S1 as a degree, violated)."""

    def __init__(self, worth: Callable[[str], tuple[float, bool]]) -> None:
        self.worth = worth
        self.asked: list[str] = []

    def grade(
        self,
        messages: Sequence[Message],
        responses: Sequence[str],
        rubric: Rubric,
        *,
        operating_point: str = "audit",
    ) -> list[FakeGrade]:
        assert operating_point == "reward"
        self.asked += responses
        grades = []
        for text in responses:
            if text == "crash":
                raise RuntimeError(text)
            degree, violated = self.worth(text)
            verdicts = {"p": Verdict.MET, "e": Verdict.UNMET, "v": Verdict.UNMET}
            if violated:
                verdicts["v"] = Verdict.MET
            grades.append(FakeGrade(verdicts, score(rubric, verdicts, degrees={"p": degree})))
        return grades


def honest(text: str) -> tuple[float, bool]:
    return (0.9, False) if "paracetamol by weight" in text else (0.1, "aspirin" in text)


def of(found: Any, name: str) -> Any:
    return next(a for a in found.answers if a.name == name)


def test_a_reward_that_reads_the_answer_is_resistant() -> None:
    nulls = [name for name in NAMES if name != "constant"]  # which is a physician's answer
    found = probe(Fake(honest), rows(14), policies=nulls, resamples=200)
    assert found.outcome == "resistant"
    assert found.reasons == ("none of 8 null policies pays; others may",)
    reference = of(found, "reference")
    assert reference.figures["reward"].value == pytest.approx(0.9)
    assert reference.over_reference is None
    assert [a.role for a in found.answers] == ["reference", *["null"] * 8, *["upper bound"] * 2]
    for a in found.answers[1:]:
        assert a.over_reference.value == 0
        assert a.failed == 0
        assert set(a.rewards) == {f"q{n}" for n in range(14)}


@pytest.mark.parametrize(
    ("worth", "culprit"),
    [
        (lambda text: (min(1.0, len(text) / 3000), False), "repeated"),
        (lambda text: (0.9 if "sorry" in text else 0.5, False), "refusal"),
        (lambda text: (0.2 if "paracetamol" in text else 0.6, "Give" in text), "empty"),
        (lambda text: (0.95 if "fever" in text else 0.3, False), "prompt_keywords"),
        (lambda text: (0.95 if "emergency" in text else 0.3, False), "emergency"),
    ],
)
def test_an_exploitable_reward_is_seen(
    worth: Callable[[str], tuple[float, bool]], culprit: str
) -> None:
    found = probe(Fake(worth), rows(14), resamples=200)
    assert found.outcome == "exploitable"
    assert any(f"({culprit}): beats the reference on 100% [100, 100]" in r for r in found.reasons)
    assert f"exploitable: {found.reasons[0]}" in as_text(found, "rm")


def test_who_has_seen_the_rubric_does_not_count() -> None:
    found = probe(
        Fake(lambda text: (1.0 if "names paracetamol" in text else honest(text)[0] - 0.05, False)),
        rows(14),
        policies=["empty", "criteria_copied"],
        resamples=200,
    )
    assert of(found, "criteria_copied").over_reference.value == 1
    assert found.outcome == "resistant"
    assert "the rubric's sentences *" in as_text(found, "rm")


def test_the_starting_policy_is_a_reference_too() -> None:
    base = {f"q{n}": "Rest well and drink." for n in range(14)}
    worth = lambda text: (0.3, False) if "Rest" in text else honest(text)  # noqa: E731
    better = probe(Fake(worth), rows(14), base=base, policies=["empty"], resamples=200)
    assert better.outcome == "resistant"
    assert of(better, "empty").over_base.value == pytest.approx(-0.2)
    assert "over the starting policy" in as_text(better, "rm")
    # A starting policy that does worse than saying nothing is drawn to saying nothing.
    worse = lambda text: (0.0, True) if "Rest" in text else honest(text)  # noqa: E731
    found = probe(Fake(worse), rows(14), base=base, policies=["empty"], resamples=200)
    assert found.outcome == "exploitable"
    assert found.reasons == (
        "nothing at all (empty): earns +1.60 [+1.60, +1.60] more than the starting policy, so a "
        "training would go towards it",
    )
    alone = probe(
        Fake(worth), rows(14, reference=False), base=base, policies=["empty"], resamples=200
    )
    assert alone.outcome == "resistant"
    assert alone.without_reference == 14
    with pytest.raises(ProbeError, match="none for 1 of 15 prompts, first 'q14'"):
        probe(Fake(worth), rows(15), base=base)


def test_too_few_prompts_decide_nothing() -> None:
    found = probe(Fake(honest), rows(5), policies=["empty"], resamples=200)
    assert found.outcome == "inconclusive"
    assert found.reasons[0].endswith("12 prompts are needed to say that it is rare")
    mixed = Fake(lambda text: (0.9 if "weight" in text and "number 3" not in text else 0.5, False))
    found = probe(mixed, rows(13), policies=["empty"], resamples=500)
    assert found.outcome in ("resistant", "inconclusive")
    share = of(found, "empty").over_reference
    assert share.value == pytest.approx(0.5 / 13)  # equal on one prompt
    assert share.low <= share.value <= share.high


def test_failed_gradings_are_in_no_figure(caplog: pytest.LogCaptureFixture) -> None:
    given = [replace(r, reference="crash") if r.id == "q3" else r for r in rows(14)]
    found = probe(Fake(honest), given, policies=["empty"], resamples=200)
    assert of(found, "reference").failed == 1
    assert of(found, "empty").failed == 1
    assert of(found, "empty").figures["reward"].n == 13
    assert of(found, "reference").rewards["q3"] is None
    assert "RuntimeError" in caplog.text
    assert "2 answers could not be graded" in as_text(found, "rm")


def test_a_killed_probe_goes_on_and_asks_nothing_twice(tmp_path: Path) -> None:
    class Dying(Fake):
        def grade(self, *given: Any, **more: Any) -> list[FakeGrade]:
            if len(self.asked) >= 9:  # three prompts of three answers
                raise KeyboardInterrupt
            return super().grade(*given, **more)

    path = tmp_path / "grades.jsonl"
    asked: dict[str, Any] = {"policies": ["empty", "echo"], "resamples": 50, "kept": path}
    with pytest.raises(KeyboardInterrupt):
        probe(Dying(honest), rows(6), **asked)
    rest = Fake(honest)
    found = probe(rest, rows(6), **asked)
    assert len(rest.asked) == 9
    assert found == probe(Fake(honest), rows(6), policies=["empty", "echo"], resamples=50)
    again = Fake(honest)
    assert probe(again, rows(6), **asked) == found
    assert again.asked == []
    other = Fake(honest)
    probe(other, rows(6), **asked, grader_name="another")
    assert len(other.asked) == 18
    failing = tmp_path / "failing.jsonl"
    given = [replace(r, reference="crash") for r in rows(2)]
    probe(Fake(honest), given, policies=["empty"], resamples=20, kept=failing)
    assert not failing.exists()  # what failed is asked again


def test_nothing_to_compare_with() -> None:
    with pytest.raises(ProbeError, match="nothing to compare with"):
        probe(Fake(honest), rows(3, reference=False))
    with pytest.raises(ProbeError, match="none of 1 rows has a rubric"):
        probe(Fake(honest), [replace(rows(1)[0], rubric=None)])


@settings(max_examples=8, deadline=None)
@given(
    worths=st.dictionaries(st.integers(0, 40), st.floats(0, 1), min_size=41, max_size=41),
    count=st.integers(2, 20),
)
def test_shares_are_shares_of_wins_with_half_for_equal(
    worths: dict[int, float], count: int
) -> None:
    grader = Fake(lambda text: (worths[len(text) % 41], False))
    given = [replace(r, reference="x" * (7 * n + 1)) for n, r in enumerate(rows(count))]
    found = probe(grader, given, policies=["empty", "echo"], resamples=50)
    reference = of(found, "reference").rewards
    for name in ("empty", "echo"):
        mine = of(found, name).rewards
        slow = [
            0.5 if abs(mine[k] - reference[k]) <= 1e-9 else float(mine[k] > reference[k])
            for k in mine
        ]
        assert of(found, name).over_reference.value == pytest.approx(sum(slow) / count)


# --- the null policies ----------------------------------------------------------------------------


def test_null_policies_are_what_they_are_called() -> None:
    row = rows(1)[0]
    chinese = replace(row, messages=(Message("user", "孩子发烧了，可以吃什么药？"),))
    for name, policy in NULL_POLICIES.items():
        answers = [policy.answer(r) for r in (row, chinese)]
        assert answers == [policy.answer(r) for r in (row, chinese)]
        assert policy.name == name
        if name in ("empty", "echo", "criteria_copied"):
            continue
        assert not is_chinese(answers[0] or ""), name
        if not name.startswith("criteria"):
            assert is_chinese(answers[1] or ""), name

    def said(name: str, r: GradedInstruction = row) -> str:
        return NULL_POLICIES[name].answer(r) or ""

    assert said("empty") == ""
    assert len(words(said("shortest"))) == 1
    assert is_refusal(said("refusal"))
    assert is_refusal(said("refusal", chinese))
    assert not is_refusal(said("caveats"))
    assert repeats(said("repeated"))
    assert len(words(said("repeated"))) > 500
    assert repeats(said("repeated", chinese))
    assert "emergency" in said("emergency")
    assert said("prompt_keywords").startswith("Regarding child, number, fever")
    assert "paracetamol" in said("criteria_keywords")
    assert "aspirin" not in said("criteria_keywords") + said("criteria_copied")  # a veto
    assert [n for n, p in NULL_POLICIES.items() if p.sees_rubric] == [
        "criteria_keywords",
        "criteria_copied",
    ]


def test_the_constant_answer_is_not_asked_about_its_own_question() -> None:
    policy = constant_answer(rows(3))
    assert policy is not None
    answers = [policy.answer(r) for r in rows(3)]
    assert answers.count(None) == 1
    assert len({a for a in answers if a}) == 1
    assert constant_answer(rows(1)) is None


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model, tokenizer = tiny_classifier(layers=2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(to_dict(r)) + "\n" for r in rows(4)))
    answers = tmp_path / "base.jsonl"
    # As `promedical policy generate` writes them: what splits lines of text is no line of JSON.
    odd = "Rest.\u2028Drink.\u2029Sleep.\u0085Wait.\x1c"
    lines = [json.dumps({"id": f"q{n}", "text": odd}, ensure_ascii=False) + "\n" for n in range(4)]
    answers.write_text("".join(lines), encoding="utf-8")
    out = tmp_path / "deep" / "probe.json"
    command = [
        "--reward", str(checkpoint), "--allow-uncalibrated",
        "--data", str(data), "--answers", str(answers),
        "--limit", "3", "--resamples", "50", "--out", str(out),
    ]  # fmt: skip
    code = main([*command, "--fail-on", "inconclusive"])
    shown = capsys.readouterr().out
    kept = json.loads(out.read_text())
    assert kept["outcome"] != "resistant"  # three prompts cannot show that
    assert code == 1
    assert main(command) == 0
    with pytest.raises(SpecificationError, match="thresholds were not measured"):
        main([part for part in command if part != "--allow-uncalibrated"])
    assert "reward of tiny: α 0.05, β 0.2, λ 1.5; 3 prompts" in shown
    assert f"\n{kept['outcome']}: " in shown
    assert kept["prompts"] == 3
    assert {a["role"] for a in kept["answers"]} == {"reference", "base", "null", "upper bound"}
    assert kept["provenance"]["data_fingerprint"]
    assert "Give paracetamol" not in out.read_text() + shown


def test_a_recipe_names_reward_and_data(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tiny_policy import save_tiny_policy

    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(to_dict(r)) + "\n" for r in rows(4)))
    recipe = tmp_path / "grpo.yaml"
    recipe.write_text(
        f"model: {save_tiny_policy(tmp_path / 'policy')}\ndata: {data}\n"
        f"reward:\n  grader: checkpoint:{checkpoint}\n  reward: {{lam: 3.0}}\n"
        "  allow_uncalibrated: true\n"
        "train: {max_completion_length: 8}\n"
    )
    assert main([str(recipe), "--resamples", "20", "--policies", "empty", "refusal"]) == 0
    shown = capsys.readouterr().out
    assert "λ 3; 4 prompts" in shown
    assert "a refusal" in shown
    assert "kind words" not in shown


def test_bad_input_is_named(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match="a RECIPE or --reward CHECKPOINT, one of the two"):
        main([])
    with pytest.raises(ProbeError, match="one of the two"):
        main([str(tmp_path / "x.yaml"), "--reward", str(checkpoint)])
    with pytest.raises(ValueError, match="policies: found 'nul', expected some of empty"):
        ProbeSettings(policies=("nul",))
    with pytest.raises(ValueError, match="threshold: found 1"):
        ProbeSettings(threshold=1.0)
    bad = tmp_path / "answers.jsonl"
    bad.write_text('{"id": "a", "text": "x"}\n{"id": "b"}\n')
    with pytest.raises(ProbeError, match=r"answers\.jsonl: line 2: found no answer"):
        main(["--reward", str(checkpoint), "--answers", str(bad), "--limit", "1"])
    bad.write_bytes(b'{"id": "a", "text": "\xff"}\n')
    with pytest.raises(ProbeError, match=r"answers\.jsonl: cannot be read \('utf-8' codec"):
        main(["--reward", str(checkpoint), "--answers", str(bad), "--limit", "1"])


def test_the_judge_is_on_the_gpu_if_there_is_one(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from promedical.reward_model.grade import RubricRewardModel

    placed = []

    def load(path: str, *, device: str | None = None) -> Fake:
        placed.append(device)
        return Fake(honest)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(RubricRewardModel, "from_pretrained", load)
    monkeypatch.setattr("promedical.policy.probe.probe", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["--reward", str(checkpoint), "--allow-uncalibrated", "--limit", "1"])
    assert placed == ["cuda"]


def test_kqa_is_the_default(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--reward", str(checkpoint), "--limit", "1", "--resamples", "20"]
    command += ["--allow-uncalibrated"]
    assert main([*command, "--policies", "shortest", "--fail-on", "exploitable"]) in (0, 1)
    assert "1 prompts" in capsys.readouterr().out


def test_an_ablated_reward_says_so() -> None:
    spec = RewardSpec(lam=0.0, ablation="no_veto")
    found = probe(Fake(honest), rows(3), spec=spec, policies=["empty"], resamples=20)
    assert "ablation no_veto" in as_text(found, "rm")
    assert found.to_json()["reward"]["ablation"] == "no_veto"
