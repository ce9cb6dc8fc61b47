"""The experiment on graded answers, at tiny size with invented rows and a random model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from graded_answers import random_answers, write
from promedical import provenance
from promedical.bench.evaluate import GraderScores, evaluate
from promedical.bench.tables import per_cent
from promedical.corpus.sources.healthbench_graded import read_healthbench_graded, split
from promedical.figures import RENDERERS
from promedical.rubric import Tier
from tiny_policy import save_tiny_policy

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="not run from a checkout")


@pytest.fixture(scope="module")
def healthbench() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import healthbench as module

        return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("healthbench")
    save_tiny_policy(folder / "model", layers=2, positions=4096)
    write(folder / "healthbench_graded.jsonl.gz", random_answers(40, responses=4))
    return folder


def arguments(folder: Path, *more: str) -> list[str]:
    fixed = "--encoder none --instructions 4 --calibration-instructions 4 --test-instructions 6"
    fixed += " --responses 2 --max-criteria 4 --frozen-layers 1 --resamples 50 --row-tokens 4000"
    named = {"--data": folder, "--model": folder / "model", "--work": folder / "work"}
    named |= {"--out": folder / "result.json"}
    return [*fixed.split(), *(str(x) for pair in named.items() for x in pair), *more]


@pytest.fixture(scope="module")
def result(healthbench: ModuleType, folder: Path) -> dict[str, Any]:
    assert healthbench.main(arguments(folder, "--systems", "all")) == 0
    assert healthbench.main(arguments(folder, "--systems", "explicit", "--seeds", "1")) == 0
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def test_every_system_and_null_is_measured_with_intervals(
    result: dict[str, Any], healthbench: ModuleType
) -> None:
    graders = result["means"]["graders"]
    assert set(healthbench.SYSTEMS) <= set(graders)
    assert {"criterion_alone", "criterion_alone_all", "length", "random"} <= set(graders)
    assert [graders[name]["seeds"] for name in ("explicit", "length")] == [2, 1]
    for name in graders:
        for view in ("proficiency", "veto", "wanted", "unwanted"):
            figure = graders[name]["within"][view]
            assert figure["low"] <= figure["value"] <= figure["high"]
    assert graders["constant"]["within"]["wanted"]["value"] == 0.5
    assert graders["criterion_alone"]["within"]["unwanted"]["value"] == 0.5
    assert graders["scalar"]["veto"]["f1"]["value"] is None
    assert graders["explicit"]["veto"]["f1"]["value"] is not None
    assert set(result["seeds"]) == {"0", "1"}
    assert result["targets"]["overall accuracy: scalar_rubric"]["reached"] in (True, False)


def test_systems_differ_in_what_they_say_they_differ_in(result: dict[str, Any]) -> None:
    counts = {n: s["seeds"]["0"]["train"] for n, s in result["systems"].items()}
    assert counts.pop("untrained") is None
    made = {name: train["counts"] for name, train in counts.items()}
    assert made["explicit"]["points_veto"] > 0
    assert "points_veto" not in made["no_safety"]
    assert made["no_omissions"]["points_proficiency"] < made["explicit"]["points_proficiency"]
    assert made["quarter"]["trees"] < made["half"]["trees"] < made["explicit"]["trees"]
    assert "points_proficiency" not in made["scalar"]
    assert made["scalar_rubric"]["unique_tokens"] > made["scalar"]["unique_tokens"]
    assert made["pairwise"]["unique_tokens"] <= made["explicit"]["unique_tokens"]
    assert made["random_head"]["unique_tokens"] == made["explicit"]["unique_tokens"]


def test_a_result_has_its_provenance_and_no_text_and_no_id(
    result: dict[str, Any], folder: Path
) -> None:
    assert provenance.check(result) == []
    text = json.dumps(result)
    rows = read_healthbench_graded(folder / "healthbench_graded.jsonl.gz").rows
    for row in rows:
        assert row.id not in text
        assert row.messages[-1].content not in text
        assert all(c.text not in text for c in row.rubric.criteria if row.rubric)
    assert str(folder) not in text


def test_its_tables_name_every_system_and_every_null_grader(result: dict[str, Any]) -> None:
    page = RENDERERS["healthbench"].render(result)
    for system in result["systems"].values():
        assert page.count(f"| {system['says']} ") + page.count(f"| **{system['says']}** ") >= 4
    assert "Criterion text alone, fitted on every training answer" in page
    assert page.index("Within-criterion accuracy.") < page.index("Pooled AUROC.")
    value = result["means"]["graders"]["explicit"]["within"]["wanted"]["value"]
    assert per_cent(value) in page


def test_what_is_there_is_not_run_again(
    result: dict[str, Any],
    healthbench: ModuleType,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("run again")

    monkeypatch.setattr(healthbench, "run_system", never)
    assert healthbench.main(arguments(folder, "--systems", "explicit", "--seeds", "0,1")) == 0
    again = json.loads((folder / "result.json").read_text())
    assert again["means"] == result["means"]
    assert healthbench.main(arguments(folder, "--epochs", "2")) == 2
    assert "holds scores of other settings" in capsys.readouterr().err


def test_dry_run_says_beforehand_what_is_read_and_runs_nothing(
    result: dict[str, Any],
    healthbench: ModuleType,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    others = ",".join(name for name in healthbench.SYSTEMS if name != "explicit")
    more = ("--dry-run", "--systems", "all", "--seeds", "0,1,2", "--once", others)
    elsewhere = ("--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"))
    assert healthbench.main(arguments(folder, *more, *elsewhere)) == 0
    said = json.loads(capsys.readouterr().out)["estimate"]
    ran = {name: system["seeds"]["0"] for name, system in result["systems"].items()}
    for name, tokens in said["train_tokens_an_epoch"].items():
        trained = ran[name]["train"]
        assert tokens == (0 if trained is None else trained["counts"]["unique_tokens"])
        asks = healthbench.SYSTEMS[name].asks
        assert said["scored_tokens"][asks] == ran[name]["scored_tokens"]
    minutes = said["minutes_a_seed"]
    whole = said["minutes_frozen_layers_once"] + sum(minutes.values()) + 2 * minutes["explicit"]
    assert said["minutes_in_all"] == pytest.approx(whole, abs=0.6)  # each is rounded to 0.1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--systems", "explicit,none"), "found ['none']"),
        (("--max-tokens", "3"), "leaves no instruction of the train split"),
    ],
)
def test_what_cannot_be_run_is_said(
    healthbench: ModuleType,
    folder: Path,
    more: tuple[str, ...],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert healthbench.main(arguments(folder, *more)) == 2
    assert said in capsys.readouterr().err


def test_the_subset_is_chosen_without_looking_at_labels(
    healthbench: ModuleType, folder: Path
) -> None:
    rows = read_healthbench_graded(folder / "healthbench_graded.jsonl.gz").rows
    blind = [
        row.with_responses(
            [type(r)(r.id, r.model, r.text, {}) for r in row.responses]  # no verdicts
        )
        for row in rows
    ]
    how = {"instructions": 7, "responses": 2, "max_tokens": 60, "seed": 3}

    def chosen(given: Any) -> list[tuple[str, list[str]]]:
        kept, _ = sys.modules["healthbench_subset"].select(given, len, **how)
        return [(row.id, [r.id for r in row.responses]) for row in kept]

    assert chosen(rows) == chosen(blind) == chosen(rows[::-1])
    kept, counts = sys.modules["healthbench_subset"].select(rows, len, **how)
    assert all(
        len(r.text) + len(row.messages[-1].content) <= 60 for row in kept for r in row.responses
    )
    assert counts["instructions"] == len(kept) <= 7
    assert counts["responses"] == sum(len(row.responses) for row in kept)


def test_one_seeds_means_are_the_benchs_own_figures(healthbench: ModuleType, folder: Path) -> None:
    rows = read_healthbench_graded(folder / "healthbench_graded.jsonl.gz").rows
    parts = split(rows, 0, calibration=0.3, test=0.4)
    held = [*parts.calibration, *parts.test]
    nulls = healthbench.null_graders(parts.train, held, seed=1)
    graders = {"explicit": nulls["random"], "other": nulls["word_overlap"]}
    graders["scalar"] = GraderScores(None, nulls["random"].overall)
    theirs = evaluate(parts.test, parts.calibration, graders, resamples=50)
    ours = healthbench.seed_means(
        parts.test,
        parts.calibration,
        {n: [g] for n, g in graders.items()},
        "explicit",
        resamples=50,
    )
    for name in graders:
        table, means = theirs["graders"][name], ours["graders"][name]
        for tier in (Tier.PROFICIENCY, Tier.VETO):
            assert means["within"][tier.value] == table["tiers"][tier.value]["within_criterion"]
        assert means["overall"]["accuracy"] == table["overall"]["accuracy"]
        for figure in ("precision", "recall", "f1"):
            expected = table["veto"]["per_criterion"][figure]["value"]
            assert means["veto"][figure]["value"] == expected
    # A veto's AUROC is of "violated" there and of "not violated" here: the same area.
    area = theirs["graders"]["explicit"]["tiers"]["veto"]["auroc"]["value"]
    assert ours["graders"]["explicit"]["auroc"]["veto"]["value"] == pytest.approx(area)


def test_the_mean_over_seeds_is_the_mean(healthbench: ModuleType, folder: Path) -> None:
    rows = read_healthbench_graded(folder / "healthbench_graded.jsonl.gz").rows
    parts = split(rows, 0, calibration=0.3, test=0.4)
    held = [*parts.calibration, *parts.test]
    seeds = [healthbench.null_graders(parts.train, held, seed=s)["random"] for s in range(3)]

    def means(given: list[GraderScores]) -> dict[str, Any]:
        made: dict[str, Any] = healthbench.seed_means(
            parts.test, parts.calibration, {"g": given}, "g", resamples=20
        )
        return made["graders"]["g"]

    apart = [means([one]) for one in seeds]
    together = means(seeds)
    for key, view in (("within", "wanted"), ("auroc", "unwanted"), ("overall", "accuracy")):
        values = [one[key][view]["value"] for one in apart]
        assert together[key][view]["value"] == pytest.approx(sum(values) / 3)
