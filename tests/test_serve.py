"""The process: settings, and a SIGTERM that loses nothing."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from promedical.reward_model import serve as serving
from promedical.reward_model.grade import RubricRewardModel
from promedical.reward_model.serve import ServeError, ServeRecipe
from tiny_serving import (
    SECRET,
    asking,
    assert_same,
    expected,
    tiny_grader,
)


@pytest.fixture(scope="module")
def grader() -> RubricRewardModel:
    return tiny_grader()


def test_where_the_token_comes_from(tmp_path, monkeypatch):
    monkeypatch.delenv("PROMEDICAL_TOKEN", raising=False)
    assert serving.read_token(ServeRecipe()) is None
    monkeypatch.setenv("PROMEDICAL_TOKEN", "from-the-environment")
    assert serving.read_token(ServeRecipe()) == "from-the-environment"
    file = tmp_path / "token"
    file.write_text("from-the-file\n")
    assert serving.read_token(ServeRecipe(token_file=file)) == "from-the-file"
    for bad in ("", "two words", "tökén"):
        file.write_text(bad)
        with pytest.raises(ServeError, match="expected one word"):
            serving.read_token(ServeRecipe(token_file=file))
    with pytest.raises(ServeError, match="cannot be read"):
        serving.read_token(ServeRecipe(token_file=tmp_path / "none"))


def test_other_machines_need_a_token(monkeypatch):
    monkeypatch.delenv("PROMEDICAL_TOKEN", raising=False)
    with pytest.raises(ServeError, match="expected a token"):
        serving.main(["nowhere", "--host", "0.0.0.0"])


def test_missing_packages_and_bad_settings_say_what_to_do(monkeypatch):
    monkeypatch.setattr(serving, "EXTRA", {"no_such_package": "no-such-package"})
    with pytest.raises(ServeError, match=r"pip install 'promedical\[serve\]'"):
        serving.main(["nowhere"])
    for settings_ in ({"port": 70000}, {"threads": 0}, {"max_requests": 0}):
        with pytest.raises(ServeError, match=next(iter(settings_))):
            ServeRecipe(**settings_)


@pytest.fixture(scope="module")
def checkpoint(grader, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "tiny-rm"
    grader.model.model.save_pretrained(folder)
    grader.tokenizer.save_pretrained(folder)
    grader.save_metadata(folder)
    return folder


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_sigterm_finishes_what_was_accepted(grader, checkpoint):
    command = "import sys; from promedical.cli import main; sys.exit(main(sys.argv[1:]))"
    source = str(Path(serving.__file__).parents[2])
    flags = ["--port", "0", "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", command, "rm", "serve", str(checkpoint), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": source, "PROMEDICAL_TOKEN": "abc"},
    )
    try:
        line = process.stdout.readline()
        found = re.fullmatch(
            r"promedical: serving tiny-rm at (http://127\.0\.0\.1:\d+), a token is asked for\n",
            line,
        )
        assert found, line + process.stderr.read()
        bodies = [asking(*(f"{SECRET} {i} {j}" for j in range(8))) for i in range(12)]

        async def go() -> list[httpx.Response]:
            async with httpx.AsyncClient(
                base_url=found[1], headers={"Authorization": "Bearer abc"}, timeout=120
            ) as client:
                assert (await client.get("/healthz")).status_code == 200
                tasks = [asyncio.ensure_future(client.post("/v1/grade", json=b)) for b in bodies]
                for _ in range(500):
                    text = (await client.get("/metrics")).text
                    at_work = re.search(r"\npromedical_accepted_requests (\S+)", text)
                    if float(at_work[1]) == len(bodies) or any(t.done() for t in tasks):
                        break
                process.send_signal(signal.SIGTERM)
                return list(await asyncio.gather(*tasks, return_exceptions=True))

        answers = asyncio.run(go())
        assert process.wait(60) == 0
        errors = process.stderr.read()
    finally:
        process.kill()
        process.wait()
    finished = 0
    for body, answer in zip(bodies, answers, strict=True):
        assert isinstance(answer, httpx.Response), answer
        assert answer.status_code in (200, 503)
        if answer.status_code == 200:
            finished += 1
            assert_same(answer.json()["grades"], expected(grader, body))
    assert finished
    assert "draining" in errors
    assert "stopped; 0 accepted requests unanswered" in errors
    assert SECRET not in errors
