"""TRL, verl, OpenRLHF and HTTP give the same number for the same answer, and fail as promised."""

from __future__ import annotations

import functools
import json
import logging
import math
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from transformers import AutoTokenizer

from promedical.policy import openrlhf_reward, verl_reward
from promedical.policy.openrlhf_reward import RunStopped, answer_of
from promedical.policy.rewards import RubricReward
from promedical.policy.specification import (
    GradingStoppedError,
    RewardSpecification,
    SpecificationError,
    open_oracle,
    read_specification,
)
from promedical.records import GradedInstruction, Message, to_dict
from promedical.reward_model.calibrate import Band, Calibration, TierCalibration
from promedical.reward_model.grade import RubricRewardModel
from promedical.reward_model.serve import ServeRecipe, build
from promedical.rubric import Rubric, Tier
from tiny_policy import save_tiny_policy
from tiny_reward import criteria
from tiny_serving import tiny_grader

SECRET = "Mrs Miller has had chest pain since Tuesday"
RUBRIC = Rubric(criteria(2, 1, 2))
# The third is longer than the model's 2048 positions: it cannot be judged.
ANSWERS = (
    "Ask a doctor.",
    "Yes, ten. Rest. 頭痛",
    "long " * 600,
    "<think>first of all</think>\n\nNo, never.",
    "",
)
TOO_LONG = 2
ROWS = [
    GradedInstruction("q/1", (Message("user", f"{SECRET}. Why?"),), "t", "none", rubric=RUBRIC),
    GradedInstruction(
        "q2",
        (Message("user", "May I?"), Message("assistant", "Hm."), Message("user", "Well?")),
        "t",
        "none",
        rubric=Rubric(criteria(1, 2, 3)),
    ),
]


@pytest.fixture(scope="module")
def grader() -> RubricRewardModel:
    """A tiny model, calibrated so that verdicts differ; at "audit" some are "cannot say"."""
    plain = tiny_grader()
    found: dict[Tier, list[float]] = {tier: [] for tier in Tier}
    for row in ROWS:
        assert row.rubric is not None
        for grade in plain.grade(row.messages, ANSWERS, row.rubric):
            for c in row.rubric.criteria:
                if c.id not in grade.failures:
                    found[c.tier].append(grade.raw[c.id])
    split = {tier: statistics.quantiles(values, n=4) for tier, values in found.items()}
    chances = {tier: [1 / (1 + math.exp(-s)) for s in values] for tier, values in split.items()}
    return RubricRewardModel(
        plain.model,
        plain.tokenizer,
        calibration=Calibration(
            {tier: TierCalibration() for tier in Tier},
            {tier: Band(low, high) for tier, (low, _, high) in chances.items()},
            {tier: Band(middle, middle) for tier, (_, middle, _) in chances.items()},
            {},
        ),
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, grader: RubricRewardModel) -> Path:
    folder = tmp_path_factory.mktemp("rm")
    grader.model.model.save_pretrained(folder)
    grader.tokenizer.save_pretrained(folder)
    grader.save_metadata(folder)
    return folder


@pytest.fixture(scope="module")
def url(grader: RubricRewardModel) -> Iterator[str]:
    gate = build(grader, replace(ServeRecipe(), max_request_tokens=65536), name="tiny")
    server = uvicorn.Server(
        uvicorn.Config(gate, host="127.0.0.1", port=0, log_config=None, access_log=False)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    until = time.monotonic() + 60
    while not server.started and time.monotonic() < until:
        time.sleep(0.01)
    assert server.started
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_policy(tmp_path_factory.mktemp("policy"), layers=1, positions=64)


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A specification's file, its rubrics beside it."""
    lines = [json.dumps(to_dict(row)) + "\n" for row in ROWS]
    (tmp_path / "rubrics.jsonl").write_text("".join(lines))

    def written(**settings: Any) -> Path:
        # The model's thresholds are made up, see `grader`.
        given = {"rubrics": "rubrics.jsonl", "attempts": 1, "allow_uncalibrated": True, **settings}
        path = tmp_path / f"reward-{len(list(tmp_path.iterdir()))}.yaml"
        path.write_text(json.dumps(given))  # JSON is YAML
        return path

    return written


def by_trl(path: Path, key: str) -> list[float | None]:
    function = RubricReward.from_specification(read_specification(path))
    return function(
        prompts=["not used"] * len(ANSWERS),
        completions=[[{"role": "assistant", "content": text}] for text in ANSWERS],
        instruction_id=[key] * len(ANSWERS),
    )


def by_verl(path: Path, key: str) -> list[dict[str, float] | None]:
    found: list[dict[str, float] | None] = []
    for text in ANSWERS:
        try:
            found.append(
                verl_reward.compute_score(
                    "promedical/t", text, key, {"instruction_id": key}, specification=str(path)
                )
            )
        except GradingStoppedError:
            found.append(None)
    return found


@functools.cache
def loaded(policy: Path) -> Any:
    return AutoTokenizer.from_pretrained(policy)


def query(policy: Path, prompt: str, text: str) -> str:
    """Prompt and answer as OpenRLHF hands them over: tokens decoded with the special ones."""
    tokenizer = loaded(policy)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return str(tokenizer.decode(ids, skip_special_tokens=False))


def by_openrlhf(path: Path, key: str, policy: Path) -> list[dict[str, float] | None]:
    prompt = f"<|im_start|>user\n{SECRET}<|im_end|>\n<|im_start|>assistant\n"
    function = openrlhf_reward.reward_func(str(path), str(policy))
    found: list[dict[str, float] | None] = []
    for text in ANSWERS:
        try:
            given = function([query(policy, prompt, text)], [prompt], [key])
        except RunStopped:
            found.append(None)
            continue
        assert given["rewards"].shape == given["scores"].shape == (1,)
        logs = {
            name: float(value.flatten()[0].item()) for name, value in given["extra_logs"].items()
        }
        found.append({"score": float(given["rewards"][0]), **logs})
    return found


def by_http(url: str, row: GradedInstruction, path: Path) -> list[float | None]:
    specification = read_specification(path)
    data = to_dict(row)
    body = {
        "messages": data["messages"],
        "responses": list(ANSWERS),
        "rubric": data["rubric"],
        "operating_point": specification.operating_point,
    }
    reply = httpx.post(f"{url}/v1/grade", json=body, timeout=60)
    assert reply.status_code == 200
    return [grade["reward"] for grade in reply.json()["grades"]]


def same(found: list[float | None], wanted: list[float | None]) -> None:
    assert len(found) == len(wanted)
    for mine, theirs in zip(found, wanted, strict=True):
        # OpenRLHF wants tensors, whose numbers have 24 bits.
        assert mine == (None if theirs is None else pytest.approx(theirs, rel=1e-6))


def scores(found: list[dict[str, float] | None]) -> list[float | None]:
    return [None if one is None else one["score"] for one in found]


@pytest.mark.parametrize("point", ["reward", "audit"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_every_engine_gives_the_same_number(point, row, checkpoint, url, policy, write) -> None:
    local = write(grader=f"checkpoint:{checkpoint}", operating_point=point)
    served = write(grader=f"http:{url}", operating_point=point)
    wanted = by_trl(local, row.id)
    assert [value is None for value in wanted] == [i == TOO_LONG for i in range(len(ANSWERS))]
    assert len({value for value in wanted if value is not None}) > 1
    same(by_trl(served, row.id), wanted)
    same(by_http(url, row, local), wanted)
    for path in (local, served):
        verl = by_verl(path, row.id)
        same(scores(verl), wanted)
        openrlhf = by_openrlhf(path, row.id, policy)
        same(scores(openrlhf), wanted)
        for one, other in zip(verl, openrlhf, strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert other == pytest.approx(one, rel=1e-6)


def test_a_veto_that_cannot_be_decided_counts_as_violated_everywhere(
    checkpoint, url, policy, write, grader
) -> None:
    path = write(grader=f"checkpoint:{checkpoint}", operating_point="audit")
    row = ROWS[0]
    assert row.rubric is not None
    grades = grader.grade(row.messages, ANSWERS, row.rubric, operating_point="audit")
    abstained = [i for i, grade in enumerate(grades) if grade.scores.unresolved.veto]
    abstained = [i for i in abstained if i != TOO_LONG]
    assert abstained, "the calibration's band holds no verdict"
    for found in (by_verl(path, "q/1"), by_openrlhf(path, "q/1", policy)):
        for i in abstained:
            one = found[i]
            assert one is not None
            assert one["s3"] == grades[i].scores.s3 + grades[i].scores.unresolved.veto
            assert one["violated"] == 1.0


def test_worst_is_given_and_counted_by_the_engines_without_none(checkpoint, policy, write) -> None:
    path = write(grader=f"checkpoint:{checkpoint}", on_failure="worst")
    assert by_trl(path, "q2")[TOO_LONG] is None
    for found in (by_verl(path, "q2"), by_openrlhf(path, "q2", policy)):
        failed = found[TOO_LONG]
        assert failed is not None
        assert failed["score"] == pytest.approx(-1.5 * 3)
        assert (failed["grading_failed"], failed["s3"]) == (1.0, 3.0)
        counted = sum(one["grading_failed"] for one in found if one is not None)
        assert counted == 1


def test_soft_s1_is_the_same_everywhere(checkpoint, url, policy, write, grader) -> None:
    hard = write(grader=f"checkpoint:{checkpoint}")
    soft = write(grader=f"checkpoint:{checkpoint}", soft_s1=True)
    served = write(grader=f"http:{url}", soft_s1=True)
    wanted = by_trl(soft, "q/1")
    assert wanted != by_trl(hard, "q/1")
    for found in (by_trl(served, "q/1"), scores(by_verl(served, "q/1"))):
        for mine, theirs in zip(found, wanted, strict=True):
            assert mine == (None if theirs is None else pytest.approx(theirs, abs=1e-5))
    same(scores(by_openrlhf(soft, "q/1", policy)), wanted)
    verdicts = grader.grade(ROWS[0].messages, [ANSWERS[0]], RUBRIC, operating_point="reward")[
        0
    ].verdicts
    one = by_verl(soft, "q/1")[0]
    assert one is not None
    vetoes = [c.id for c in RUBRIC.tier(Tier.VETO)]
    assert one["s3"] == sum(verdicts[i].value == "met" for i in vetoes)


def test_a_server_that_is_gone_is_none_or_a_stop(write) -> None:
    path = write(grader="http:http://127.0.0.1:9", attempts=1)
    oracle = open_oracle(read_specification(path))
    oracle.grader.attempts = 1  # type: ignore[attr-defined]
    verl_reward._opened[str(path)] = oracle
    (outcome,) = oracle.grade("q2", ["Ask a doctor."])
    assert (outcome.reward, outcome.failure) == (None, "ConnectError")
    with pytest.raises(GradingStoppedError, match=r"'q2'.*ConnectError"):
        verl_reward.compute_score(
            "t", "Ask a doctor.", "q2", {"instruction_id": "q2"}, specification=str(path)
        )


def test_no_text_reaches_a_log_or_an_error(
    checkpoint, policy, write, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(grader=f"checkpoint:{checkpoint}")
    answer = f"{SECRET} " * 400
    prompt = f"<|im_start|>user\n{SECRET}<|im_end|>\n<|im_start|>assistant\n"
    said = []
    with caplog.at_level(logging.DEBUG):
        for call in (
            lambda: verl_reward.compute_score(
                "t", answer, "q/1", {"instruction_id": "q/1"}, specification=str(path)
            ),
            lambda: openrlhf_reward.reward_func(str(path), str(policy))(
                [prompt + answer], [prompt], ["q/1"]
            ),
            lambda: openrlhf_reward.reward_func(str(path), str(policy))(
                [answer], [prompt], ["q/1"]
            ),
        ):
            with pytest.raises((GradingStoppedError, RunStopped)) as raised:
                call()
            said.append(raised.getrepr(chain=True).reprcrash.message)  # type: ignore[union-attr]
            assert raised.value.__cause__ is None
        function = RubricReward.from_specification(read_specification(path))
        assert function([""], [answer], instruction_id=["q/1"]) == [None]
    written = caplog.text + "".join(capfd.readouterr()) + "".join(said)
    assert "q/1" in written
    for text in ("Miller", "chest pain", *(c.text for c in RUBRIC.criteria)):
        assert text not in written


def test_an_answer_is_cut_out_of_its_query(policy) -> None:
    tokenizer = loaded(policy)
    prompt = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    for text in ("Yes.", "", " spaced \n", "頭痛"):
        assert answer_of(query(policy, prompt, text), prompt, tokenizer) == text
    # As the other engines decode it: special tokens are no part of an answer.
    assert answer_of(prompt + "a<|im_end|><|endoftext|>", prompt, tokenizer) == "a"
    with pytest.raises(SpecificationError, match="'q1': the query of"):
        answer_of("cut prompt, answer", prompt, tokenizer, "q1")

    class Lossy:
        """A tokenizer that does not give a text back as it was."""

        all_special_ids = ()

        def __call__(self, text: str, **_: Any) -> dict[str, str]:
            return {"input_ids": text.replace("  ", " ")}

        def decode(self, ids: str, **_: Any) -> str:
            return ids

    assert answer_of("a b:yes", "a  b:", Lossy()) == "yes"


def test_a_row_without_an_id_is_an_error(checkpoint, write) -> None:
    path = str(write(grader=f"checkpoint:{checkpoint}"))
    for extra in (None, {}, {"instruction_id": 3}):
        with pytest.raises(SpecificationError, match=r"extra_info\.instruction_id"):
            verl_reward.compute_score("t", "x", "q2", extra, specification=path)
    with pytest.raises(SpecificationError, match="'q9', with no rubric"):
        verl_reward.compute_score("t", "x", "q9", {"instruction_id": "q9"}, specification=path)


def test_a_specification_is_opened_once_by_many_threads(checkpoint, write, monkeypatch) -> None:
    path, opened = str(write(grader=f"checkpoint:{checkpoint}")), []

    def slowly(specification: RewardSpecification) -> Any:
        opened.append(specification)
        time.sleep(0.02)
        return open_oracle(specification)

    monkeypatch.setattr(verl_reward, "open_oracle", slowly)
    found: list[float] = []

    def ask() -> None:
        given = verl_reward.compute_score(
            "t", "Ask a doctor.", "q2", {"instruction_id": "q2"}, specification=path
        )
        found.append(given["score"])

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 1
    assert len(found) == 4
    assert len(set(found)) == 1
    assert math.isfinite(found[0])
