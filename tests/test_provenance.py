"""Provenance: every field is there, and nothing in it belongs to one machine."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from promedical import provenance as module
from promedical.provenance import REQUIRED, check, portable, provenance, recipe_hash


@dataclass(frozen=True)
class Recipe:
    alpha: float = 0.05
    out: Path = Path("runs/x")


def test_every_required_field_is_there_and_plain_json() -> None:
    found = provenance(seed=3, recipe=Recipe(), data_fingerprint="ab", started=time.perf_counter())
    assert set(REQUIRED) <= set(found)
    assert json.loads(json.dumps(found)) == found
    assert found["seed"] == 3
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["numpy"] is not None
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["cpu"]


def test_a_result_with_its_provenance_passes_unless_it_has_no_commit() -> None:
    found = provenance(seed=3, command=["promedical", "quickstart"])
    found["commit"], found["dirty"] = "abc", False
    assert check({"provenance": found}) == []
    found["commit"] = None
    assert check({"provenance": found}) == ["provenance.commit: null, expected a value"]


@pytest.mark.parametrize("field", REQUIRED)
def test_check_names_the_missing_field(field: str) -> None:
    found = provenance(seed=3, command=["promedical"])
    found["commit"], found["dirty"] = "abc", False
    del found[field]
    assert check({"provenance": found}) == [f"provenance.{field}: missing"]


def test_check_refuses_a_result_without_any() -> None:
    assert "missing" in check({"figures": 1})[0]


def test_check_finds_a_path_of_one_machine() -> None:
    found = provenance(seed=3, command=["promedical"])
    found["commit"], found["dirty"] = "abc", False
    found["command"] = ["promedical", "--out=/home/someone/x"]
    assert "path of one machine" in check({"provenance": found})[0]


def test_paths_outside_become_variables_with_a_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    (cache / "m").mkdir(parents=True)
    (cache / "m" / "model.bin").write_bytes(b"abc")
    secret = tmp_path / "patients of dr x"
    secret.mkdir()
    (secret / "rows.jsonl").write_text("{}")
    monkeypatch.setenv("PROMEDICAL_CACHE", str(cache))
    found = provenance(
        seed=1,
        command=[
            str(tmp_path / "bin" / "promedical"),
            "rm",
            f"--model={cache}/m/model.bin",
            "--data",
            f"{tmp_path}/rows.jsonl",
            "--url",
            "http://user:pass@localhost:8000/v1",
            "--api-key",
            "sk-123",
            "--max-tokens",
            "120",
            "--ratio=1/2",
        ],
    )
    assert found["command"] == [
        "promedical",
        "rm",
        "--model=$PROMEDICAL_CACHE/m/model.bin",
        "--data",
        "$ELSEWHERE/rows.jsonl",
        "--url",
        "http://***@localhost:8000/v1",
        "--api-key",
        "***",
        "--max-tokens",
        "120",
        "--ratio=1/2",
    ]
    assert found["inputs"] == {
        "$PROMEDICAL_CACHE/m/model.bin": (
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        )
    }
    assert str(tmp_path) not in json.dumps(found)


def test_paths_with_spaces_never_leak_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "patients of dr x"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("{}")
    for argument in (f"{folder}/rows.jsonl", f"--data={folder}/rows.jsonl"):
        found = provenance(seed=1, command=["promedical", argument])
        assert str(tmp_path) not in json.dumps(found)
        assert "dr x" not in json.dumps(found)


def test_parents_and_file_urls_do_not_leak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    below = tmp_path / "below"
    below.mkdir()
    monkeypatch.chdir(below)
    found = provenance(
        seed=1,
        command=["promedical", "../a/b/rows.jsonl", f"file://{tmp_path}/x.json", "./here.json"],
    )
    assert found["command"][1:] == ["$ELSEWHERE/rows.jsonl", "$ELSEWHERE/x.json", "./here.json"]


def test_programs_read_as_they_are_typed() -> None:
    root = module.project_root()
    package = Path(module.__file__).parent
    assert module._program(str(package / "figures.py"), root) == [
        "python",
        "-m",
        "promedical.figures",
    ]
    assert module._program(str(package / "__main__.py"), root) == ["python", "-m", "promedical"]
    assert module._program("/usr/bin/promedical", root) == ["promedical"]
    if root is not None:
        assert module._program(str(root / "benchmarks" / "x.py"), root) == [
            "python",
            "benchmarks/x.py",
        ]


def test_an_installed_package_has_no_commit_but_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "project_root", lambda: None)
    found = provenance(seed=1, command=["promedical"])
    assert found["commit"] is None
    assert found["dirty"] is None
    assert "promedical" in found["versions"]


def test_a_missing_git_is_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object, **__: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(module.subprocess, "run", absent)
    assert module._commit(Path(".")) == (None, None)


def test_recipe_hash_ignores_order_and_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert recipe_hash({"a": 1, "b": (1, 2)}) == recipe_hash({"b": [1, 2], "a": 1})
    assert recipe_hash({"a": 1}) != recipe_hash({"a": 2})
    assert recipe_hash(Recipe()) == recipe_hash({"alpha": 0.05, "out": Path("runs/x")})
    monkeypatch.setenv("GRADED_DATA", str(tmp_path))
    assert portable(tmp_path / "x" / "rows") == "$GRADED_DATA/x/rows"
    with pytest.raises(TypeError, match="recipe"):
        recipe_hash({"a": object()})


def test_wall_time_takes_either_clock() -> None:
    for started in (time.perf_counter() - 5, time.time() - 5):
        assert 5 <= provenance(seed=1, started=started)["wall_time_s"] < 20
    age = provenance(seed=1)["wall_time_s"]
    assert age is None or age > 0
