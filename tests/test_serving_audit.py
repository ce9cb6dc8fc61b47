"""POST /v1/audit: the findings of `audit`, the limits and the silence of the server."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from promedical.audit.answers import Answer
from promedical.audit.run import audit
from promedical.records import Message
from promedical.reward_model.grade import RubricRewardModel
from promedical.reward_model.serving_schema import AuditAnswer, ErrorAnswer
from promedical.rubric import VetoKind
from scripted_grader import CALIBRATION
from tiny_serving import RUBRIC, SECRET, ask, asking, running, served, tiny_grader


@pytest.fixture(scope="module")
def grader() -> RubricRewardModel:
    return tiny_grader(calibration=CALIBRATION)


def body(*responses: str, rubric: bool = True, **more: Any) -> dict:
    given = asking(*responses, **more)
    return given if rubric else {k: v for k, v in given.items() if k != "rubric"}


def close(found: Any, wanted: Any) -> None:
    """Equal, but for the last digits of numbers."""
    if isinstance(wanted, dict):
        assert set(found) == set(wanted)
        for key in wanted:
            close(found[key], wanted[key])
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted)
        for mine, theirs in zip(found, wanted, strict=True):
            close(mine, theirs)
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, abs=1e-4)
    else:
        assert found == wanted


@pytest.mark.parametrize("rubric", [True, False])
def test_findings_are_those_of_audit(grader, rubric):
    given = body("Ask a doctor.", "<think>never closed", rubric=rubric)
    answer = ask(served(grader), "POST", "/v1/audit", json=given)
    assert answer.status_code == 200
    AuditAnswer.model_validate(answer.json())
    found = answer.json()
    assert found["auditor"]["veto_recall"] == pytest.approx(49 / 54)
    assert found["auditor"]["recall_set"] == "the checkpoint's calibration split"
    rows = [
        Answer(str(i), (Message(**given["messages"][0]),), text, RUBRIC if rubric else None)
        for i, text in enumerate(given["responses"])
    ]
    report = audit(rows, grader, name="tiny")
    wanted = {f.answer.id: f.to_json() for f in report.findings}
    for i, mine in enumerate(found["audits"]):
        theirs = {k: v for k, v in wanted[str(i)].items() if k != "id"}
        close(mine, theirs)
        assert (mine["scores"]["s1"] is None) == (not rubric)


def test_what_is_asked_can_be_set(grader):
    kinds = {c["kind"] for c in _first(grader, body(rubric=False, clinician=True))["criteria"]}
    assert VetoKind.BEYOND_REMIT not in kinds
    own = _first(grader, body(bank=False))["criteria"]
    assert [c["criterion"] for c in own] == [c.id for c in RUBRIC.criteria]
    assert len(_first(grader, body())["criteria"]) > len(own)


def _first(grader: RubricRewardModel, given: dict) -> dict:
    return ask(served(grader), "POST", "/v1/audit", json=given).json()["audits"][0]


def test_a_judgment_that_fails_is_shown_as_failed(grader):
    small = RubricRewardModel(
        grader.model, grader.tokenizer, max_tokens=160, calibration=CALIBRATION
    )
    given = body("Take ten more. " * 30, rubric=False)
    found = _first(small, given)
    assert found["outcome"] == "failed"
    assert found["says"] == "cannot say on 7 of 7 vetoes; grading failed on 10 of 10 criteria"
    assert {c["verdict"] for c in found["criteria"]} == {"error"}
    assert all("more than the 160 that fit" in c["failure"] for c in found["criteria"])
    assert all(c["confidence"] is None for c in found["criteria"])


def test_errors_name_the_field_and_quote_nothing(grader, caplog):
    caplog.set_level(logging.DEBUG)
    gate = served(grader)
    hiding = body()
    hiding["rubric"]["criteria"][0] |= {"id": "veto.harmful_advice"}
    faults = {
        "clinician": body() | {"clinician": SECRET},
        "bank": body() | {"bank": 1},
        "rubric": body() | {"rubric": SECRET},
        "responses": body() | {"responses": []},
        "operating_point": body() | {"operating_point": "reward"},
        "rubric.criteria[0].id": hiding,
        "messages": body() | {"messages": [{"role": "assistant", "content": SECRET}]},
    }

    async def go() -> dict[str, Any]:
        async with running(gate) as client:
            return {f: await client.post("/v1/audit", json=given) for f, given in faults.items()}

    for field, answer in asyncio.run(go()).items():
        assert answer.status_code == 422, field
        ErrorAnswer.model_validate(answer.json())
        assert answer.json()["error"]["param"] == field
        assert SECRET not in answer.text
    assert SECRET not in "".join(r.getMessage() for r in caplog.records)


def test_limits_token_and_log_are_those_of_grading(grader, caplog):
    caplog.set_level(logging.INFO)
    gate = served(grader, token="s3cret", max_judgments=9)
    given = body("Ask.", question=SECRET, rubric=False)

    async def go() -> None:
        async with running(gate) as client:
            assert (await client.post("/v1/audit", json=given)).status_code == 401
            allowed = {"Authorization": "Bearer s3cret"}
            large = await client.post("/v1/audit", json=given, headers=allowed)
            assert large.status_code == 422
            assert "1 responses × 10 criteria = 10 judgments" in large.json()["error"]["message"]
            nurse = given | {"clinician": True}  # one criterion less
            fits = await client.post("/v1/audit", json=nurse, headers=allowed)
            assert fits.status_code == 200
            text = (await client.get("/metrics", headers=allowed)).text
            assert 'promedical_requests_total{route="/v1/audit",status="200"} 1.0' in text

    asyncio.run(go())
    lines = [r.getMessage() for r in caplog.records if r.name == "promedical.serve"]
    assert lines[-2].startswith("/v1/audit status=200")
    assert "responses=1 judgments=9" in lines[-2]
    assert SECRET not in "".join(lines)


def test_the_requests_in_the_documents_are_answered(grader):
    docs = Path(__file__).parents[1] / "docs"
    shown = re.findall(r"```json\n(\{\n.*?\n\})\n```", (docs / "serving.md").read_text(), re.DOTALL)
    grade, audited = map(json.loads, shown)
    assert ask(served(grader), "POST", "/v1/grade", json=grade).status_code == 200
    in_line = re.search(r"/v1/audit .*?-d '(\{.*?\})'", (docs / "audit.md").read_text(), re.DOTALL)
    assert in_line
    for given in (audited, json.loads(in_line[1])):
        answer = ask(served(grader), "POST", "/v1/audit", json=given)
        assert answer.status_code == 200
        (found,) = answer.json()["audits"]
        assert found["scores"]["s1"] is None
