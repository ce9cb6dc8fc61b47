"""Answers over HTTP are those of `grade`, whatever is asked together."""

from __future__ import annotations

import asyncio
import math
import re

import httpx
import pytest

from promedical.reward_model.calibrate import Band, Calibration, TierCalibration
from promedical.reward_model.grade import RubricRewardModel
from promedical.reward_model.serving_judge import ClassifyJob, GradeJob, Limits
from promedical.reward_model.serving_schema import (
    ClassifyAnswer,
    ClassifyRequest,
    ErrorAnswer,
    GradeAnswer,
    GradeRequest,
)
from promedical.rubric import Rubric, Tier
from tiny_reward import criteria
from tiny_serving import (
    ask,
    asking,
    assert_same,
    expected,
    paths_of,
    rubric_json,
    running,
    served,
    tiny_grader,
)


@pytest.fixture(scope="module")
def grader() -> RubricRewardModel:
    return tiny_grader()


# --- grading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", ["audit", "reward"])
def test_grades_are_those_of_grade(grader, point):
    body = asking(
        "Ask a doctor.",
        "<think>never closed",
        "",
        operating_point=point,
        reward_spec={"alpha": 0.1, "beta": 0.3, "lam": 2},
    )
    answer = ask(served(grader), "POST", "/v1/grade", json=body)
    assert answer.status_code == 200
    GradeAnswer.model_validate(answer.json())
    assert answer.json()["model"] == "tiny"
    assert_same(answer.json()["grades"], expected(grader, body))
    assert [g["emptied"] for g in answer.json()["grades"]] == [False, True, False]


def test_operating_points_and_calibration_are_the_checkpoints():
    tiers = {t: TierCalibration(2.0, 0.5) for t in Tier}
    never, always = ({t: Band(cut, cut) for t in Tier} for cut in (1.1, 0.0))
    grader = tiny_grader(calibration=Calibration(tiers, always, never, {}))
    for point, verdict in (("audit", "met"), ("reward", "unmet")):
        body = asking(operating_point=point)
        answer = ask(served(grader), "POST", "/v1/grade", json=body).json()
        assert_same(answer["grades"], expected(grader, body))
        assert set(answer["grades"][0]["verdicts"].values()) == {verdict}


def test_many_requests_at_once_are_batched_and_each_gets_its_own_answer(grader):
    gate = served(grader, batch_tokens=3000)
    bodies = [
        asking(*(f"Take {i + j}." for j in range(1 + i % 3)), question=f"And {i}?")
        for i in range(24)
    ]

    async def go() -> tuple[list[httpx.Response], str]:
        async with running(gate) as client:
            answers = await asyncio.gather(*(client.post("/v1/grade", json=b) for b in bodies))
            return list(answers), (await client.get("/metrics")).text

    answers, metrics = asyncio.run(go())
    for body, answer in zip(bodies, answers, strict=True):
        assert_same(answer.json()["grades"], expected(grader, body))
    batches = float(re.search(r"promedical_batch_requests_count (\S+)", metrics)[1])
    assert batches < len(bodies) / 2
    assert f'promedical_requests_total{{route="/v1/grade",status="200"}} {len(bodies)}.0' in metrics
    assert "promedical_queue_tokens 0.0" in metrics
    assert "promedical_accepted_requests 0.0" in metrics


def test_a_path_that_is_too_long_is_an_error_and_no_verdict(grader):
    small = RubricRewardModel(grader.model, grader.tokenizer, max_tokens=160)
    body = asking("Ask a doctor.", "Take ten more. " * 30)
    short, long = ask(served(small), "POST", "/v1/grade", json=body).json()["grades"]
    assert not short["failures"]
    assert set(long["verdicts"].values()) == {"error"}
    assert set(long["raw"].values()) == set(long["probabilities"].values()) == {None}
    assert all("more than the 160 that fit" in why for why in long["failures"].values())
    assert long["reward"] is None
    assert long["scores"]["unresolved"]["errors"] == 5
    assert_same([short], expected(small, body)[:1])


def test_a_safety_only_rubric_has_no_reward(grader):
    body = asking() | {"rubric": rubric_json(Rubric(criteria(0, 0, 2), safety_only=True))}
    for grade in ask(served(grader), "POST", "/v1/grade", json=body).json()["grades"]:
        assert grade["scores"]["s1"] is None
        assert grade["reward"] is None


# --- /classify ----------------------------------------------------------------------------------


def test_classify_gives_raw_scores_in_vllms_shape(grader):
    body = asking()
    ids = paths_of(grader, body)
    wanted = [s for g in expected(grader, body) for s in g["raw"].values()]
    request = {"model": "tiny", "input": ids, "use_activation": False}
    answer = ask(served(grader), "POST", "/classify", json=request)
    assert answer.status_code == 200
    found = ClassifyAnswer.model_validate(answer.json())
    assert [d.probs[0] for d in found.data] == pytest.approx(wanted, abs=1e-4)
    assert [d.index for d in found.data] == list(range(len(ids)))
    assert {d.num_classes for d in found.data} == {1}
    assert found.usage.prompt_tokens == found.usage.total_tokens == sum(map(len, ids))


def test_classify_reads_what_its_inputs_share_once(grader):
    body = asking("Ask a doctor.", "Yes, ten.", "No.")
    given = ClassifyRequest(input=paths_of(grader, body))
    job = ClassifyJob.read(given, grader, Limits(10**6, 10**6, 10**6))
    whole = GradeJob.read(GradeRequest.model_validate(body), grader, Limits(10**6, 10**6, 10**6))
    # Not more than the tree that /v1/grade makes of the same.
    assert job.asked.tokens <= whole.asked.tokens < job.sent / 3
    assert job.asked.judgments == whole.asked.judgments == 15


def test_classify_takes_all_four_inputs_and_the_activation(grader):
    ids = paths_of(grader, asking())[:2]
    texts = [grader.tokenizer.decode(i) for i in ids]

    def scores(given, **more) -> list[float]:
        body = {"input": given, "add_special_tokens": False, **more}
        data = ask(served(grader), "POST", "/classify", json=body).json()["data"]
        return [d["probs"][0] for d in data]

    first, second = scores(ids, use_activation=False)
    assert scores(ids[0], use_activation=False) == pytest.approx([first], abs=1e-5)
    assert scores(texts, use_activation=False) == pytest.approx([first, second], abs=1e-4)
    assert scores(texts[0], use_activation=False) == pytest.approx([first], abs=1e-4)
    assert scores(ids) == pytest.approx([1 / (1 + math.exp(-s)) for s in (first, second)])


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": [1, "a"]}, "input"),
        ({"input": [[1, 2, 3], [1, 2, 3, 99999]]}, "input[1][3]"),
        ({"input": [1, 2, -3]}, "input[2]"),
        ({"input": [1, 2]}, "input"),
        ({"input": [[5] * 3, [5] * 2049]}, "input[1]"),
        ({"messages": []}, "input"),
        ({"input": [1, 2, 3], "use_activation": "no"}, "use_activation"),
    ],
)
def test_classify_names_the_field(grader, request_, field):
    answer = ask(served(grader), "POST", "/classify", json=request_)
    assert answer.status_code == 422
    assert ErrorAnswer.model_validate(answer.json()).error.param == field


def test_another_model_is_not_found(grader):
    body = {"model": "else", "input": [1, 2, 3]}
    assert ask(served(grader), "POST", "/classify", json=body).status_code == 404
