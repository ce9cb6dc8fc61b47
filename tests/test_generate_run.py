"""`promedical policy generate`: answers kept line by line, resumed, of a model or an endpoint."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from misbehaving_server import MisbehavingServer, Request, Says, Status
from promedical.bench.kept import Kept
from promedical.policy.commands import VERBS
from promedical.policy.generate import generate
from promedical.policy.generate_run import (
    GenerateError,
    GenerateSettings,
    answer_file,
    read_prompts,
)
from promedical.records import RecordError
from tiny_policy import save_tiny_policy

PROMPTS = [
    {"id": "a", "prompt": "May I take both?"},
    {"id": "b", "messages": [{"role": "user", "content": "A far longer question than that?"}]},
    {"id": "c", "prompt": "Why?"},
    {"id": "d", "prompt": "How long is it, and how much?"},
    {"id": "e", "prompt": "And then?"},
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_policy(tmp_path_factory.mktemp("tiny"))


def settings(folder: Path, **more: Any) -> GenerateSettings:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in PROMPTS))
    return GenerateSettings(
        path, folder / "answers.jsonl", max_new_tokens=6, batch_size=2, device="cpu", **more
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_are_those_of_the_policy_in_the_prompts_order(tiny: Path, tmp_path: Path) -> None:
    told = settings(tmp_path)
    moved: list[tuple[int, int]] = []
    found = answer_file(tiny, told, progress=lambda *given: moved.append(given))
    expected = generate(tiny, read_prompts(told.prompts), max_new_tokens=6, device="cpu")
    assert [line["id"] for line in found] == list("abcde")
    assert tuple(line["text"] for line in found) == expected.texts
    assert tuple(line["tokens"] for line in found) == expected.tokens
    assert lines(told.out) == found
    assert (moved[0], moved[-1]) == ((0, 5), (5, 5))
    for path in (told.out, tmp_path / "answers.jsonl.run.json"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert answer_file(tiny, told) == found


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_killed_run_writes_the_answers_that_it_would_have_written(
    temperature: float, after: int, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "whole").mkdir()
    whole = answer_file(tiny, settings(tmp_path / "whole", temperature=temperature))
    told = settings(tmp_path, temperature=temperature)
    add = Kept.add

    class Killed(BaseException):
        """Stands for the signal that ends a process."""

    def deadly(self: Kept, line: Any) -> None:
        if len(self.lines) == after:
            raise Killed
        add(self, line)

    with monkeypatch.context() as patch:
        patch.setattr(Kept, "add", deadly)
        with pytest.raises(Killed):
            answer_file(tiny, told)
    assert len(lines(told.out)) == after
    with told.out.open("a") as file:
        file.write('{"id": "tor')  # half a line
    assert answer_file(tiny, told) == whole


def test_a_prompt_that_does_not_fit_is_a_failure_with_its_reason(
    tiny: Path, tmp_path: Path
) -> None:
    told = settings(tmp_path)
    long = {"id": "long", "prompt": "x" * 600}
    told.prompts.write_text(json.dumps(PROMPTS[0]) + "\n" + json.dumps(long) + "\n")
    found = answer_file(tiny, told)
    assert found[1] == {"id": "long", "failure": "the prompt is too long for the model"}
    assert "text" in found[0]


def test_an_endpoint_is_asked_again_for_what_failed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    refuses = {"Why?"}

    def answer(request: Request) -> Any:
        if request.prompt in refuses:
            return Status(400)
        return Says(f"Answer to {request.prompt}")

    told = settings(tmp_path)
    with MisbehavingServer(answer) as server:
        flags = ["--prompts", str(told.prompts), "--out", str(told.out)]
        assert VERBS["generate"]([*flags, "--endpoint", f"m@{server.url}"]) == 0
        assert "4 answers, 1 failures" in capfd.readouterr().out
        refuses.clear()
        assert VERBS["generate"]([*flags, "--endpoint", f"m@{server.url}"]) == 0
    assert "5 answers, 0 failures" in capfd.readouterr().out
    texts = {line["id"]: line["text"] for line in lines(told.out)}
    assert texts["c"] == "Answer to Why?"
    assert list(texts) == list("abcde")


def test_a_file_of_other_answers_is_left_alone(tiny: Path, tmp_path: Path) -> None:
    told = settings(tmp_path)
    answer_file(tiny, told)
    with pytest.raises(GenerateError, match="holds answers of a run with other settings"):
        answer_file(tiny, replace(told, max_new_tokens=7))
    other = tmp_path / "mine.txt"
    other.write_text("mine")
    with pytest.raises(GenerateError, match=r"mine\.txt: exists, and no run wrote it"):
        answer_file(tiny, replace(told, out=other))
    assert other.read_text() == "mine"
    for given in ((None, told), (tiny, replace(told, endpoint="m@http://127.0.0.1:9/v1"))):
        with pytest.raises(GenerateError, match="either a checkpoint or --endpoint"):
            answer_file(*given)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{}", "line 1: id"),
        ('{"id": "a"}', "line 1: messages"),
        ('{"id": "a", "prompt": "x", "messages": []}', "line 1: prompt: expected none"),
        ("not JSON", "line 1: not JSON"),
        ('{"id": "a", "prompt": "x"}\n{"id": "a", "prompt": "y"}', "line 2: id: 'a' repeats"),
        ("", "found no prompt"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(line)
    with pytest.raises(RecordError, match=message):
        read_prompts(path)
