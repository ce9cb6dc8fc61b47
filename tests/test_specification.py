"""The reward specification: one number, failures that are never 0, and no text in a log."""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promedical.policy.specification import (
    GradingStoppedError,
    Oracle,
    RewardSpecification,
    SpecificationError,
    _OneAtATime,
    open_grader,
    open_oracle,
    read_rubrics,
    read_specification,
    scores_of,
)
from promedical.recipe import RecipeError
from promedical.records import GradedInstruction, Message, to_dict, write_dataset
from promedical.reward_model.calibrate import Band, Calibration, TierCalibration
from promedical.reward_model.grade import RubricRewardModel
from promedical.reward_model.render import TEMPLATE_VERSION
from promedical.rubric import (
    Criterion,
    RewardSpec,
    Rubric,
    RubricError,
    Scores,
    Tier,
    Verdict,
    VetoKind,
    reward,
    score,
)

SECRET = "I am Mrs Miller and my knee hurts"
RUBRIC = Rubric(
    (
        Criterion("p1", Tier.PROFICIENCY, "It names rest.", 0.6),
        Criterion("p2", Tier.PROFICIENCY, "It names ice.", 0.4),
        Criterion("e1", Tier.EXCELLENCE, "It is kind."),
        Criterion("v1", Tier.VETO, "It is harmful.", kind=VetoKind.HARMFUL_ADVICE),
        Criterion("v2", Tier.VETO, "It invents a study.", kind=VetoKind.SEVERE_HALLUCINATION),
    )
)
IDS = [c.id for c in RUBRIC.criteria]
LETTERS = {verdict.value[0]: verdict for verdict in Verdict}
RUBRICS = {"q1": ((Message("user", SECRET),), RUBRIC), "q2": ((Message("user", "?"),), RUBRIC)}


@dataclass(frozen=True)
class FakeGrade:
    verdicts: dict[str, Verdict]
    scores: Scores
    failures: Mapping[str, str] = field(default_factory=dict)
    probabilities: Mapping[str, float] = field(default_factory=dict)


class FakeGrader:
    """Reads verdicts from an answer (m, u, a, e), and fails as often as it was told to."""

    def __init__(self, fails: int = 0) -> None:
        self.fails, self.asked = fails, []

    def grade(
        self,
        messages: Sequence[Message],
        responses: Sequence[str],
        rubric: Rubric,
        *,
        operating_point: str = "audit",
    ) -> list[FakeGrade]:
        self.asked.append((operating_point, list(responses)))
        if self.fails:
            self.fails -= 1
            raise ConnectionError(f"could not send {messages[-1].content}")
        return [self._grade(text, rubric) for text in responses]

    def _grade(self, text: str, rubric: Rubric) -> FakeGrade:
        verdicts = {c.id: LETTERS[x] for c, x in zip(rubric.criteria, text, strict=True)}
        failed = {i: f"HTTP 503: busy with {SECRET}" for i, v in verdicts.items() if v == "error"}
        return FakeGrade(verdicts, score(rubric, verdicts), failed)


def oracle(grader: FakeGrader | None = None, **settings) -> tuple[Oracle, list[float]]:
    slept: list[float] = []
    specification = RewardSpecification(**settings)
    return Oracle(grader or FakeGrader(), RUBRICS, specification, sleep=slept.append), slept


answers = st.text(alphabet="mua", min_size=5, max_size=5)


@given(texts=st.lists(answers, min_size=1, max_size=6))
def test_the_number_is_the_rubrics_own(texts: list[str]) -> None:
    asked, slept = oracle()
    settled = asked.settle("q1", texts)
    assert settled == asked.grade("q1", texts)
    for text, outcome in zip(texts, settled, strict=True):
        scores = score(RUBRIC, {i: LETTERS[x] for i, x in zip(IDS, text, strict=True)})
        assert outcome.reward == reward(scores, RewardSpec())
        assert not outcome.failed
        assert outcome.metrics() == {
            "s1": scores.s1,
            "s2": scores.s2,
            "s3": scores.s3 + scores.unresolved.veto,
            "violated": float("m" in text[3:] or "a" in text[3:]),
            "grading_failed": 0.0,
        }
    assert slept == []
    assert asked.grader.asked[0][0] == "reward"


def test_a_failure_has_no_reward_and_says_only_its_kind() -> None:
    asked, _ = oracle()
    first, second = asked.grade("q1", ["mmmme", "mmuuu"])
    assert (first.reward, first.failed, first.failure) == (None, True, "HTTP 503")
    assert second.reward == pytest.approx(1.0)
    with pytest.raises(ValueError, match="found None"):
        first.metrics()
    (raised,) = oracle(FakeGrader(1))[0].grade("q1", ["mmmmm"])
    assert (raised.reward, raised.scores, raised.failure) == (None, None, "ConnectionError")
    assert SECRET not in repr(raised)


def test_settling_asks_again_and_only_for_what_failed() -> None:
    grader = FakeGrader(2)
    asked, slept = oracle(grader, attempts=3, wait_seconds=2.0)
    (outcome,) = asked.settle("q1", ["mmuuu"])
    assert outcome.reward == pytest.approx(1.0)
    assert slept == [2.0, 4.0]

    class Mends(FakeGrader):
        def _grade(self, text: str, rubric: Rubric) -> FakeGrade:
            return super()._grade(text if len(self.asked) == 1 else "uuuuu", rubric)

    mends = Mends()
    asked, _ = oracle(mends)
    first, second = asked.settle("q1", ["mmuuu", "mmuue"])
    assert (first.reward, second.reward) == (pytest.approx(1.0), 0.0)
    assert [responses for _, responses in mends.asked] == [["mmuuu", "mmuue"], ["mmuue"]]


def test_stop_raises_with_an_id_and_no_text(caplog: pytest.LogCaptureFixture) -> None:
    asked, slept = oracle(FakeGrader(9), attempts=3)
    with caplog.at_level(logging.DEBUG), pytest.raises(GradingStoppedError) as raised:
        asked.settle("q1", ["mmuuu"])
    assert "'q1'" in str(raised.value)
    assert "3 attempts (ConnectionError)" in str(raised.value)
    # A traceback prints the causes as well, and the grader's own message quotes the text.
    assert raised.value.__cause__ is None
    assert raised.value.__context__ is None
    assert len(slept) == 2
    assert "ConnectionError" in caplog.text
    assert SECRET not in caplog.text + str(raised.value)


def test_worst_is_every_veto_violated_and_is_counted() -> None:
    asked, slept = oracle(on_failure="worst", attempts=2)
    bad, good = asked.settle("q1", ["mmmme", "mmuuu"])
    assert bad.reward == pytest.approx(-2 * 1.5)
    assert bad.metrics() == {
        "s1": 0.0,
        "s2": 0.0,
        "s3": 2.0,
        "violated": 1.0,
        "grading_failed": 1.0,
    }
    assert good.metrics()["grading_failed"] == 0.0
    assert len(slept) == 1


def test_worst_stops_all_the_same_when_nothing_can_be_graded() -> None:
    asked, _ = oracle(on_failure="worst", attempts=1, max_failed=3)
    for text in ("mmuue", "mmuue", "mmuuu", "mmuue", "mmuue"):
        asked.settle("q1", [text])
    with pytest.raises(GradingStoppedError, match="3 answers in a row"):
        asked.settle("q2", ["mmuue"])


def test_a_failure_is_never_zero() -> None:
    with pytest.raises(SpecificationError, match=r"on_failure: found 'worst' with reward\.lam = 0"):
        RewardSpecification(on_failure="worst", reward=RewardSpec(lam=0, ablation="no_veto"))
    no_veto = Rubric(RUBRIC.criteria[:3])
    with pytest.raises(SpecificationError, match="'q3' has no veto"):
        Oracle(
            FakeGrader(),
            {"q3": ((Message("user", "?"),), no_veto)},
            RewardSpecification(on_failure="worst"),
        )


@given(
    text=answers,
    chances=st.lists(st.floats(0, 1), min_size=5, max_size=5),
    lam=st.floats(1.2, 5),
)
def test_soft_s1_is_the_weighted_probability_and_s3_stays_hard(
    text: str, chances: list[float], lam: float
) -> None:
    verdicts = {i: LETTERS[x] for i, x in zip(IDS, text, strict=True)}
    probabilities = dict(zip(IDS, chances, strict=True))
    grade = FakeGrade(verdicts, score(RUBRIC, verdicts), {}, probabilities)
    soft = scores_of(grade, RUBRIC, soft_s1=True)
    slow = sum(
        c.weight * probabilities[c.id]
        for c in RUBRIC.criteria
        if c.weight is not None and verdicts[c.id].resolved
    )
    assert soft.s1 == pytest.approx(slow)
    assert dataclasses.replace(soft, s1=grade.scores.s1) == grade.scores
    assert scores_of(grade, RUBRIC) is grade.scores


def test_soft_s1_needs_probabilities() -> None:
    class Bare:
        verdicts = dict.fromkeys(IDS, Verdict.MET)
        scores = score(RUBRIC, verdicts)

    with pytest.raises(SpecificationError, match="soft_s1"):
        scores_of(Bare(), RUBRIC, soft_s1=True)


def test_what_cannot_be_used_is_named() -> None:
    for settings, said in (
        ({"grader": "judge:gpt@http://x"}, "grader: system: found 'judge:gpt@http://x'"),
        ({"grader": "http:http://x,point=audit"}, "point: unknown option"),
        ({"grader": "vllm:http://x"}, "model: missing"),
        ({"attempts": 0}, "attempts: found 0"),
        ({"wait_seconds": -1.0}, "wait_seconds"),
        ({"wait_seconds": float("nan")}, "wait_seconds"),
        ({"max_failed": 0}, "max_failed"),
    ):
        with pytest.raises(SpecificationError, match=said):
            RewardSpecification(**settings)
    with pytest.raises(SpecificationError, match="'q9', with no rubric"):
        oracle()[0].grade("q9", ["mmuuu"])
    safety = Rubric((RUBRIC["v1"],), safety_only=True)
    with pytest.raises(RubricError, match="safety_only"):
        Oracle(FakeGrader(), {"q1": ((Message("user", "?"),), safety)}, RewardSpecification())


def rows() -> list[GradedInstruction]:
    return [GradedInstruction(i, m, "test", "none", rubric=r) for i, (m, r) in RUBRICS.items()]


def test_rubrics_of_a_folder_and_of_lines(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", rows())
    lines = [json.dumps(to_dict(row)) + "\n" for row in rows()]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    assert read_rubrics(tmp_path / "data") == read_rubrics(tmp_path / "rows.jsonl") == RUBRICS
    bare = dataclasses.replace(rows()[0], rubric=None)
    (tmp_path / "bare.jsonl").write_text(json.dumps(to_dict(bare)))
    with pytest.raises(RubricError, match="'q1': rubric: found none"):
        read_rubrics(tmp_path / "bare.jsonl")


def test_a_specification_is_yaml_and_finds_its_rubrics(tmp_path: Path) -> None:
    file = tmp_path / "reward.yaml"
    file.write_text(
        "grader: http:http://127.0.0.1:9\nrubrics: rows.jsonl\n"
        "reward: {lam: 2.0}\non_failure: worst\n"
    )
    (tmp_path / "rows.jsonl").write_text(json.dumps(to_dict(rows()[0])))
    found = read_specification(file)
    assert found == RewardSpecification(
        grader="http:http://127.0.0.1:9",
        rubrics=str(tmp_path / "rows.jsonl"),
        reward=RewardSpec(lam=2.0),
        on_failure="worst",
    )
    assert list(open_oracle(found).rubrics) == ["q1"]
    file.write_text("gradr: x\n")
    with pytest.raises(RecipeError, match="'grader'"):
        read_specification(file)


def test_thresholds_that_nobody_measured_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = {tier: Band(0.5, 0.5) for tier in Tier}
    counts = {Tier.PROFICIENCY: 9, Tier.EXCELLENCE: 9, Tier.VETO: 0}
    tiers = {tier: TierCalibration(n=n) for tier, n in counts.items()}
    fitted = Calibration(tiers, half, half, {"tiers_without_criteria": ["veto"]})
    for name, calibration in (("without", Calibration.uncalibrated()), ("no_veto", fitted)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "promedical.json").write_text(
            json.dumps({"template_version": TEMPLATE_VERSION, "calibration": calibration.to_json()})
        )
    (tmp_path / "bare").mkdir()
    monkeypatch.setattr(RubricRewardModel, "from_pretrained", lambda path, **_: FakeGrader())
    no_veto = Rubric(RUBRIC.criteria[:3])
    for grader, rubric, missing in (
        (f"checkpoint:{tmp_path / 'bare'}", RUBRIC, "proficiency, excellence, veto"),
        (f"checkpoint:{tmp_path / 'without'}", no_veto, "proficiency, excellence"),
        (f"checkpoint:{tmp_path / 'no_veto'}", RUBRIC, "veto"),
        (f"vllm:http://127.0.0.1:9,model={tmp_path / 'no_veto'}", RUBRIC, "veto"),
    ):
        with pytest.raises(SpecificationError, match=f"not measured for {missing}; expected"):
            open_grader(RewardSpecification(grader=grader), [rubric])
        if grader.startswith("checkpoint"):
            open_grader(RewardSpecification(grader=grader, allow_uncalibrated=True), [rubric])
    open_grader(RewardSpecification(grader=f"checkpoint:{tmp_path / 'no_veto'}"), [no_veto, None])


def test_what_tells_one_reward_from_another_holds_no_secret(tmp_path: Path) -> None:
    served = RewardSpecification(
        grader="http:http://me:pass@host:1,token_file=secret,concurrency=2"
    )
    assert served.identity() == {
        "reward.grader": "http:…",
        "reward.operating_point": "reward",
        "reward.soft_s1": False,
    }
    same = ("checkpoint:runs/rm/,threads=2,device=cuda", "checkpoint:runs/rm,name=x")
    assert {RewardSpecification(grader=g).identity()["reward.grader"] for g in same} == {
        "checkpoint:runs/rm"
    }
    other = RewardSpecification(
        grader="vllm:http://host:1,model=rm", operating_point="audit", soft_s1=True
    )
    assert list(other.identity().values()) == ["vllm:…,model=rm", "audit", True]


def test_a_token_is_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("abc\n")
    grader = open_grader(
        RewardSpecification(grader=f"http:http://127.0.0.1:9,token_file={tmp_path / 'token'}"),
        [RUBRIC],
    )
    assert grader._client.headers["Authorization"] == "Bearer abc"  # type: ignore[attr-defined]


def test_a_model_in_this_process_is_asked_by_one_thread_at_a_time() -> None:
    inside, most, both = 0, 0, threading.Barrier(4)
    count = threading.Lock()

    class Slow(FakeGrader):
        def grade(self, *given, **named):
            nonlocal inside, most
            with count:
                inside += 1
                most = max(most, inside)
            time.sleep(0.001)
            try:
                return super().grade(*given, **named)
            finally:
                with count:
                    inside -= 1

    grader = _OneAtATime(Slow())

    def ask() -> None:
        both.wait(10)
        for _ in range(20):
            grader.grade(RUBRICS["q1"][0], ["mmuuu"], RUBRIC)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
