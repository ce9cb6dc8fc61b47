"""A whole build: what each stage leaves, what is run again, what a kill or a refusal leaves."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_asker import FakeAsker
from promedical.corpus.build import Build, build, check_accounts, folder_of
from promedical.corpus.build_plan import as_text, plan
from promedical.corpus.build_recipe import ALL_STAGES, BuildRecipe, settings_of
from promedical.corpus.build_stages import STAGES, Context
from promedical.corpus.degrade_stage import DegradeSettings, degrade_rows
from promedical.corpus.stage import CorpusError, Dropped, StageResult, read_stage
from promedical.demo.kqa import load_kqa
from promedical.llm.calls import Call, Endpoint, Failure
from promedical.progress import Stages
from promedical.recipe import load_recipe
from promedical.records import GradedInstruction, Message, read_dataset, to_dict
from scripted_models import HashedWords, scripted, write_questions, write_recipe

ASKING = ("screen", "respond", "rubrics", "judge")


class Said(Stages):
    """Progress that is kept, not shown."""

    def __init__(self) -> None:
        super().__init__(len(ALL_STAGES))
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def recipe_of(folder: Path, *flags: str, **how: Any) -> BuildRecipe:
    return load_recipe(BuildRecipe, write_recipe(folder, **how), list(flags))


def run(
    recipe: BuildRecipe,
    answer: Callable[[Call], str | Failure] = scripted,
    *,
    again: tuple[str, ...] = (),
) -> tuple[dict[str, Any], FakeAsker, list[str]]:
    asker, said = FakeAsker(answer), Said()
    report = build(recipe, asker=asker, encoder=HashedWords(), again=again, show=said)
    return report, asker, said.lines


def outcome(out: Path) -> dict[str, Any]:
    """What a build left, less times."""
    found: dict[str, Any] = {}
    for path in sorted(out.glob("[0-9]*/")):
        report = json.loads((path / "report.json").read_text())
        report.pop("seconds")
        report.pop("calls", None)
        found[path.name] = report
        for file in sorted(path.glob("*.jsonl")):
            found[f"{path.name}/{file.name}"] = file.read_text()
    for file in sorted((out / "10-export" / "dataset").rglob("*")):
        if file.is_file():
            found[str(file.relative_to(out))] = file.read_bytes()
    return found


@pytest.fixture(scope="module")
def built(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[BuildRecipe, dict[str, Any], FakeAsker]:
    folder = tmp_path_factory.mktemp("built")
    recipe = recipe_of(folder)
    report, asker, _ = run(recipe)
    return recipe, report, asker


@pytest.fixture
def finished(tmp_path: Path, built: tuple[BuildRecipe, dict[str, Any], FakeAsker]) -> BuildRecipe:
    """A copy of the build, in a folder of its own."""
    shutil.copytree(built[0].out, tmp_path / "out")
    return replace(built[0], out=tmp_path / "out")


def without(recipe: BuildRecipe, name: str) -> BuildRecipe:
    """The build as it was before a stage began."""
    for later in ALL_STAGES[ALL_STAGES.index(name) :]:
        shutil.rmtree(folder_of(recipe.out, later), ignore_errors=True)
    return recipe


def test_every_stage_leaves_a_folder_and_no_row_is_lost(
    built: tuple[BuildRecipe, dict[str, Any], FakeAsker],
) -> None:
    recipe, report, _ = built
    names = [stage["stage"] for stage in report["stages"]]
    assert names == [n for n in ALL_STAGES if n != "degrade"]
    ids: set[str] | None = None
    for name in names:
        found = read_stage(folder_of(recipe.out, name))
        assert found is not None
        rows, told = found
        dropped = [
            json.loads(line)
            for line in (folder_of(recipe.out, name) / "dropped.jsonl").read_text().splitlines()
        ]
        after = {row.id for row in rows}
        if ids is not None:
            assert after | {d["id"] for d in dropped} == ids
            assert after.isdisjoint(d["id"] for d in dropped)
        assert told["rows_in"] == len(rows) + len(dropped)
        ids = after
    assert ids
    by_name = {stage["stage"]: stage for stage in report["stages"]}
    assert by_name["ingest"]["reasons"] == {"broken_row": 1}
    assert by_name["dedup"]["reasons"] == {"duplicate": 1}
    assert by_name["screen"]["rows_out"] == 8
    assert by_name["judge"]["calls"]["calls"] > 0


def test_degradation_follows_the_split_and_uses_the_phrases_of_each_side() -> None:
    assert ALL_STAGES.index("splits") < ALL_STAGES.index("degrade")
    rows = load_kqa().train[:4]
    side_of = {row.id: ("train", "bench")[n % 2] for n, row in enumerate(rows)}
    settings = DegradeSettings()
    found = STAGES["degrade"].run(rows, settings, Context(split_of=side_of))
    assert set(found.report["counts"]) == {"train", "bench"}
    assert found == degrade_rows(rows, settings, split_of=side_of)


def test_the_report_has_counts_and_no_text(
    built: tuple[BuildRecipe, dict[str, Any], FakeAsker],
) -> None:
    recipe, report, _ = built
    page = (recipe.out / "report.md").read_text()
    assert "| dedup | 25 | 1 duplicate | 24 |" in page
    assert "| screen | 24 | 0% |" in page
    assert "Left out: degrade." in page
    assert json.loads((recipe.out / "report.json").read_text()) == report
    for text in (page, json.dumps(report)):
        assert "warfarin" not in text
        assert "Advice" not in text


def test_rows_end_graded_and_exported(
    built: tuple[BuildRecipe, dict[str, Any], FakeAsker],
) -> None:
    recipe, _, _ = built
    dataset = folder_of(recipe.out, "export") / "dataset"
    rows = [row for side in (dataset / "graded").iterdir() for row in read_dataset(side)]
    assert rows
    for row in rows:
        assert row.rubric is not None
        assert row.difficulty is not None
        assert len(row.responses) == 2
        assert all(set(r.verdicts) == {c.id for c in row.rubric.criteria} for r in row.responses)
        assert all("think" not in r.text for r in row.responses)
    card = (dataset / "README.md").read_text()
    assert f"| invented | CC0-1.0 | {len(rows)} |" in card
    assert "| dedup | 25 | 24 | 1 duplicate |" in card


def test_a_finished_build_asks_nothing_again(
    built: tuple[BuildRecipe, dict[str, Any], FakeAsker],
) -> None:
    recipe, report, _ = built
    before = outcome(recipe.out)
    again, asker, said = run(recipe)
    assert asker.asked == []
    assert again == report
    assert len(said) == len(recipe.ordered)
    assert all("done before" in line for line in said)
    assert outcome(recipe.out) == before


def test_only_what_changed_and_what_follows_is_run_again(finished: BuildRecipe) -> None:
    assert finished.judge is not None
    changed = replace(finished, judge=replace(finished.judge, ask="criterion", rounds=1))
    _, asker, said = run(changed)
    assert {call.id.partition("/")[0] for call in asker.asked} == {"judge"}
    done = [line.split("] ")[1].partition(":")[0] for line in said if "done before" in line]
    assert done == ["ingest", "dedup", "screen", "respond", "rubrics"]
    assert any("judge (again: changed: ask, rounds)" in line for line in said)
    assert any("splits (again: the rows before it changed)" in line for line in said)


def test_rows_that_come_out_the_same_change_nothing_after_them(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, stages="[ingest, dedup, splits]")
    run(recipe)
    _, _, said = run(replace(recipe, dedup=replace(recipe.dedup, batch=7)))
    assert any("dedup (again: changed: batch)" in line for line in said)
    assert any("splits: done before" in line for line in said)


def held_out_at(recipe: BuildRecipe, name: str) -> list[str]:
    lines = (folder_of(recipe.out, name) / "dropped.jsonl").read_text().splitlines()
    dropped = map(json.loads, lines)
    return [d["id"] for d in dropped if d["reason"] == "held_out"]


def test_nobody_is_paid_for_a_question_that_is_held_out(tmp_path: Path) -> None:
    bench = tmp_path / "bench.jsonl"
    recipe = recipe_of(tmp_path)
    recipe = replace(recipe, splits=replace(recipe.splits, hold_out=(str(bench),)))
    text = "Which vaccines are due at the age of twelve months"
    with (tmp_path / "questions.jsonl").open("a") as file:
        file.write(json.dumps({"question": text}) + "\n")
    row = GradedInstruction("b1", (Message("user", text.upper()),), "bench", "CC0-1.0")
    bench.write_text(json.dumps(to_dict(row)) + "\n")
    report, asker, _ = run(recipe)
    out = held_out_at(recipe, "dedup")
    rows = read_dataset(folder_of(recipe.out, "ingest") / "rows")
    assert out == [row.id for row in rows if row.messages[0].content == text]
    asked = {call.id.split("/")[1] for call in asker.asked}
    assert len(asked) == 24
    assert asked.isdisjoint(out)
    by_name = {stage["stage"]: stage for stage in report["stages"]}
    assert by_name["dedup"]["reasons"] == {"duplicate": 1, "held_out": len(out)}
    assert by_name["splits"]["reasons"] == {}
    # The shares are no matter of the benchmark's; another benchmark is.
    other = replace(recipe, splits=replace(recipe.splits, train=0.6, bench=0.15))
    _, asker, said = run(other)
    assert asker.asked == []
    assert any("dedup: done before" in line for line in said)
    _, asker, said = run(replace(recipe, splits=replace(recipe.splits, hold_out=())))
    assert any("dedup (again: changed: hold_out)" in line for line in said)
    assert {call.id.split("/")[1] for call in asker.asked} >= set(out)
    # Without de-duplication the splits see to it.
    alone = replace(recipe, out=tmp_path / "alone", stages=("ingest", "splits"))
    run(alone)
    assert held_out_at(alone, "splits") == out


def test_another_server_or_price_is_no_change(finished: BuildRecipe) -> None:
    recipe = finished
    assert recipe.screen is not None
    moved = replace(
        recipe.screen.endpoint,
        base_url="http://elsewhere/v1",
        api_key_env="KEY",
        concurrency=64,
        usd_per_million_in=3.0,
    )
    _, asker, _ = run(replace(recipe, screen=replace(recipe.screen, endpoint=moved)))
    assert asker.asked == []


def test_a_stage_can_be_asked_for_again(finished: BuildRecipe) -> None:
    recipe = finished
    before = outcome(recipe.out)
    _, asker, said = run(recipe, again=("screen",))
    assert {call.id.partition("/")[0] for call in asker.asked} == {"screen"}
    assert any("screen (again: asked for)" in line for line in said)
    assert outcome(recipe.out) == before
    with pytest.raises(CorpusError, match="again: found 'degrade'"):
        run(recipe, again=("degrade",))


def test_a_stage_that_is_left_out_passes_rows_unchanged(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, stages="[export, ingest]")
    report, _, _ = run(recipe)
    assert [(s["stage"], s["rows_out"]) for s in report["stages"]] == [
        ("ingest", 25),
        ("export", 25),
    ]
    assert sorted(p.name for p in recipe.out.glob("[0-9]*")) == ["01-ingest", "10-export"]
    assert (recipe.out / "10-export" / "dataset" / "graded" / "train").is_dir()


# --- what is refused ------------------------------------------------------------------------------


def test_a_corpus_of_other_sources_is_refused(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, stages="[ingest, dedup]")
    run(recipe)
    write_questions(tmp_path / "questions.jsonl", 5)
    with pytest.raises(CorpusError, match=r"other sources \(ingest: files changed\).*--again"):
        run(recipe)
    report, _, _ = run(recipe, again=("ingest",))
    assert report["stages"][-1]["rows_out"] == 5


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    recipe.out.mkdir()
    (recipe.out / "thesis.txt").write_text("mine")
    with pytest.raises(CorpusError, match=r"'thesis.txt'.*no build's"):
        run(recipe)
    assert [p.name for p in recipe.out.iterdir()] == ["thesis.txt"]
    with pytest.raises(CorpusError, match="is a file"):
        run(replace(recipe, out=tmp_path / "recipe.yaml"))


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, stages="[ingest]")
    with (
        Build(recipe).opened(),
        pytest.raises(CorpusError, match="another run is at work"),
    ):
        run(recipe)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"stages": ("dedup", "sreen")}, "'sreen'"),
        ({"stages": ()}, "found none"),
        ({"stages": ("screen",)}, "screen: missing"),
        ({"stages": ("dedup",), "budget_usd": -1.0}, "budget_usd"),
        ({"stages": ("dedup",), "max_failed": 2.0}, "max_failed"),
    ],
)
def test_recipes_that_cannot_be_used(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(CorpusError, match=named):
        BuildRecipe(**settings)


def test_a_reached_budget_stops_the_stage_and_the_next_run_goes_on(finished: BuildRecipe) -> None:
    recipe = without(finished, "respond")

    def poor(call: Call) -> str | Failure:
        if call.id.startswith("respond/"):
            return Failure(call, "budget", "not sent: the budget was reached")
        return scripted(call)

    with pytest.raises(CorpusError, match=r"respond: the budget was reached.*--budget-usd"):
        run(recipe, poor)
    assert not (folder_of(recipe.out, "respond") / "report.json").exists()
    _, asker, _ = run(recipe)
    assert {call.id.partition("/")[0] for call in asker.asked} == set(ASKING) - {"screen"}


def test_a_server_that_is_down_drops_no_rows(finished: BuildRecipe) -> None:
    recipe = without(finished, "judge")
    down = []

    def broken(call: Call) -> str | Failure:
        if call.id.startswith("judge/"):
            down.append(call)
            return Failure(call, "connection", "refused")
        return scripted(call)

    with pytest.raises(CorpusError, match=r"judge: \d+ of \d+ calls were not answered"):
        run(recipe, broken)
    assert down
    # A stage that may lose some is finished, and says how many.
    report, _, _ = run(replace(recipe, max_failed=1.0), broken)
    told = next(s for s in report["stages"] if s["stage"] == "judge")
    assert told["calls"]["failures"]["connection"] > 0
    report, _, _ = run(without(recipe, "judge"))
    told = next(s for s in report["stages"] if s["stage"] == "judge")
    assert told["reasons"] == {}
    assert told["calls"]["failures"] == {}


def instruction(id: str) -> GradedInstruction:
    return GradedInstruction(id, (Message("user", "?"),), "s", "l")


IDS = st.lists(st.sampled_from("abcdef"), max_size=6)


@given(st.sets(st.sampled_from("abcdef")), IDS, IDS)
def test_accounts_are_accepted_if_and_only_if_they_balance(
    before: set[str], kept: list[str], dropped: list[str]
) -> None:
    rows = [instruction(id) for id in sorted(before)]
    result = StageResult([instruction(id) for id in kept], [Dropped(id, "x") for id in dropped])
    if sorted(kept + dropped) == sorted(before):
        check_accounts("dedup", rows, result)
        return
    with pytest.raises(CorpusError, match=r"dedup: \d rows are (lost|there twice|from nowhere)"):
        check_accounts("dedup", rows, result)


def test_lines_that_vanish_in_ingest_are_noticed() -> None:
    result = StageResult([instruction("a")], [Dropped("f:2", "x")], {"read": 3})
    with pytest.raises(CorpusError, match="3 rows read, 2 kept or dropped"):
        check_accounts("ingest", [], result)


def test_a_stage_that_loses_a_row_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from promedical.corpus import build_stages

    def careless(rows: Any, *_: Any) -> StageResult:
        return StageResult(rows[1:])

    stage = replace(build_stages.STAGES["dedup"], run=careless)
    monkeypatch.setitem(build_stages.STAGES, "dedup", stage)
    recipe = recipe_of(tmp_path, stages="[ingest, dedup]")
    with pytest.raises(CorpusError, match="dedup: 1 rows are lost: "):
        run(recipe)
    assert not (folder_of(recipe.out, "dedup") / "report.json").exists()


# --- settings -------------------------------------------------------------------------------------


def test_what_a_stage_is_recognised_by_holds_no_address_and_no_key(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    found = settings_of(recipe.respond)
    assert json.loads(json.dumps(found)) == found
    assert "127.0.0.1" not in json.dumps(found)
    assert found["models"][1]["max_tokens"] == 50
    keyed = Endpoint("m", "http://x/v1", api_key_env="OPENAI_API_KEY")
    assert recipe.judge is not None
    told = settings_of(replace(recipe.judge, endpoints=(keyed,)))
    assert "OPENAI_API_KEY" not in json.dumps(told)


# --- the plan -------------------------------------------------------------------------------------


def test_the_plan_of_the_next_stage_is_exact_and_sends_nothing(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    before_rows = plan(Build(recipe))
    assert [p.state for p in before_rows if p.stage in ASKING] == ["estimate"] * 4
    assert "run the stages before it first" in as_text(before_rows, Build(recipe))
    assert not recipe.out.exists()

    run(replace(recipe, stages=("ingest", "dedup")))
    planned = {p.stage: p for p in plan(Build(recipe))}
    assert planned["dedup"].state == "done"
    assert planned["screen"].state == "exact"
    assert [e.calls for e in planned["screen"].endpoints] == [24]
    # Two models, at most 8 rows of those screened; one rubric and two verdicts for each.
    assert [(e.model, e.calls) for e in planned["respond"].endpoints] == [
        ("first", 8),
        ("second", 8),
    ]
    assert [e.calls for e in planned["rubrics"].endpoints] == [8]
    assert [e.calls for e in planned["judge"].endpoints] == [16]
    assert planned["respond"].endpoints[0].usd > 0
    assert planned["export"].state == "asks nobody"
    text = as_text(plan(Build(recipe)), Build(recipe))
    assert "~ 8" in text
    assert "warfarin" not in text

    _, asker, _ = run(replace(recipe, stages=("ingest", "dedup", "screen")))
    assert sum(c.id.startswith("screen/") for c in asker.asked) == 24


def test_the_plan_of_a_finished_build(finished: BuildRecipe) -> None:
    planned = plan(Build(finished))
    assert {p.state for p in planned} == {"done"}
    assert "Done before" in as_text(planned, Build(finished))
    changed = replace(finished, pairs=replace(finished.pairs, known_only="never"))
    states = {p.stage: p.state for p in plan(Build(changed))}
    assert (states["splits"], states["pairs"]) == ("done", "asks nobody")


def test_an_estimate_is_scaled_up_from_a_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("promedical.corpus.build_plan.SAMPLE", 6)
    recipe = recipe_of(tmp_path)
    assert recipe.screen is not None
    assert recipe.respond is not None
    one = recipe.respond.models[0]
    # Two samplings of one model: their invented answers must not be taken for one.
    models = (one, replace(one, temperature=0.5))
    recipe = replace(
        recipe,
        screen=replace(recipe.screen, target=0),
        respond=replace(recipe.respond, models=models),
    )
    run(replace(recipe, stages=("ingest", "dedup")))
    planned = {p.stage: p for p in plan(Build(recipe))}
    assert [e.calls for e in planned["screen"].endpoints] == [24]
    assert [e.calls for e in planned["respond"].endpoints] == [24, 24]
    assert [e.calls for e in planned["judge"].endpoints] == [48]


# --- killed ---------------------------------------------------------------------------------------


def build_slowly(path: str) -> None:
    def slow(call: Call) -> str:
        time.sleep(0.01)
        return scripted(call)

    recipe = load_recipe(BuildRecipe, path)
    build(recipe, asker=FakeAsker(slow), encoder=HashedWords(), show=Said())


def test_killed_at_any_moment_it_goes_on_and_ends_the_same(
    tmp_path: Path, built: tuple[BuildRecipe, dict[str, Any], FakeAsker]
) -> None:
    """SIGKILL while each of several stages is at work, then to the end."""
    path = write_recipe(tmp_path)
    recipe = load_recipe(BuildRecipe, path)
    # One process imports everything, and the killed ones are its forks.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_build"])
    for name in ("screen", "judge"):
        child = context.Process(target=build_slowly, args=(str(path),))
        child.start()
        before = folder_of(recipe.out, ALL_STAGES[ALL_STAGES.index(name) - 1]) / "report.json"
        deadline = time.monotonic() + 120
        while not before.exists() and child.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        child.kill()
        child.join()
        assert before.exists()
        assert child.exitcode == -signal.SIGKILL
    run(recipe)
    reference, _, _ = built
    mine, theirs = outcome(recipe.out), outcome(reference.out)
    assert mine.keys() == theirs.keys()
    for name in theirs:
        if name.endswith("report.json"):
            continue
        if isinstance(theirs[name], dict):  # a stage's report; the questions' file is another
            strip = ("recipe", "parents")
            told = [{k: v for k, v in r[name].items() if k not in strip} for r in (mine, theirs)]
            assert told[0] == told[1], name
        else:
            assert mine[name] == theirs[name], name
