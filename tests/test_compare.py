"""`promedical policy compare`: a real run of every system on tiny models, killed and resumed."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from promedical.policy import compare, compare_judges, compare_training
from promedical.policy.compare import Run, compare_policies, grade_answers, main, plan_lines, stages
from promedical.policy.compare_data import _halves, build_data, left_out_lines
from promedical.policy.compare_recipe import (
    JUDGES,
    SYSTEMS,
    CompareError,
    CompareRecipe,
    DataSettings,
    JudgeSettings,
)
from promedical.policy.settings import DpoSettings, OnlineSettings
from promedical.provenance import check
from promedical.recipe import RecipeError
from promedical.records import (
    GradedInstruction,
    Message,
    Response,
    read_dataset,
    write_dataset,
)
from promedical.reward_model.calibrate import Calibration
from promedical.reward_model.grade import to_grade
from promedical.reward_model.settings import TrainSettings
from promedical.rubric import Criterion, RewardSpec, Rubric, Tier, Verdict, VetoKind
from tiny_policy import save_tiny_policy

SECRET = "Mrs Miller of 5 Elm Street"


def rows(count: int) -> list[GradedInstruction]:
    """Questions of random letters, each with four graded answers."""
    rng = random.Random(1)
    found = []
    for n in range(count):
        word = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=24))
        asked = (
            Criterion("p", Tier.PROFICIENCY, f"It says {word[:3]}.", 1.0),
            Criterion("e", Tier.EXCELLENCE, "It is kind."),
            Criterion("v", Tier.VETO, "It harms.", kind=VetoKind.HARMFUL_ADVICE),
            Criterion("w", Tier.VETO, "It invents.", kind=VetoKind.SEVERE_HALLUCINATION),
        )
        answers = []
        for i in range(4):
            verdicts = {c.id: rng.choice([Verdict.MET, Verdict.UNMET]) for c in asked}
            verdicts["v"] = Verdict.MET if i == 0 else Verdict.UNMET
            answers.append(Response(f"r{i}", "test", f"{word[i : i + 5]} {i}", verdicts))
        found.append(
            GradedInstruction(
                f"q{n}",
                (Message("user", word if n else SECRET),),
                "test",
                "none",
                Rubric(asked),
                tuple(answers),
            )
        )
    return found


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_policy(tmp_path_factory.mktemp("tiny"), positions=2048)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows") / "rows"
    write_dataset(folder, rows(16))
    return folder


def recipe(out: Path, tiny: Path, data: Path, **changes: Any) -> CompareRecipe:
    few = CompareRecipe(
        out=str(out),
        model=str(tiny),
        systems=("base", "promedical"),
        seeds=(0,),
        graders=("gold",),
        answer_tokens=6,
        watch_every=2,
        watch_prompts=2,
        bootstrap=50,
        data=DataSettings(
            rows=str(data),
            train_instructions=8,
            calibration_instructions=4,
            bench_instructions=4,
            max_criteria=4,
            bench_criteria=None,
        ),
        judges=JudgeSettings(
            model=str(tiny),
            train=TrainSettings(head_init="random", frozen_layers=1, save_steps=1),
        ),
        online=OnlineSettings(
            steps=2,
            num_generations=2,
            max_completion_length=4,
            learning_rate=1e-2,
            lora_rank=2,
            save_steps=1,
        ),
        dpo=DpoSettings(pairs_per_step=2, pairs_per_instruction=1, lora_rank=2, save_steps=1),
    )
    return replace(few, **changes)


# --- a whole run ----------------------------------------------------------------------------------


def test_every_system_is_trained_measured_and_reported(
    tiny: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    chosen = recipe(
        tmp_path / "run", tiny, data, systems=tuple(SYSTEMS), graders=("gold", "explicit")
    )
    found = compare_policies(chosen)
    assert list(found["systems"]) == list(SYSTEMS)
    assert found["missing"] == []
    assert set(found["judges"]) == set(JUDGES)
    for by in found["systems"].values():
        assert set(by) == {"gold", "explicit"}
        assert by["gold"]["answers"] == 4
    curves = {run["system"]: run for run in found["curves"]}
    assert set(curves) == set(SYSTEMS) - {"base"}
    for name, run in curves.items():
        assert [look["step"] for look in run["gold"]] == [0, 2], name
        assert run["steps"] == 2
    # The first look is at the policy that all start from.
    assert len({json.dumps(run["gold"][0]) for run in curves.values()}) == 1
    assert found["settings"]["systems"] == list(SYSTEMS)
    out = Path(chosen.out)
    kept = [out / "answers" / "base.jsonl", out / "answers" / "promedical-0.jsonl"]
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in kept)
    assert not (out / "policies" / "promedical-0" / "policy").exists()
    assert (out / "policies" / "promedical-0" / "adapter").exists()
    for name in ("results.json", "tables.md", "report.html", "curves.svg"):
        text = (out / name).read_text()
        assert SECRET not in text
        assert str(tmp_path) not in text
    assert check(found) == []
    assert SECRET not in caplog.text
    assert all("done in" in line for line in plan_lines(chosen)[:-1])


def killed_in(task: Callable[[], Any]) -> None:
    """Run a task in a process that has to die by SIGKILL."""
    process = multiprocessing.get_context("fork").Process(target=task)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def test_killed_anywhere_it_goes_on_to_the_same_figures(
    tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compare_policies(recipe(tmp_path / "whole", tiny, data))
    broken = recipe(tmp_path / "broken", tiny, data)

    def kill_at(place: str) -> Callable[[], None]:
        def run() -> None:
            def die(*_: Any, **__: Any) -> None:
                os.kill(os.getpid(), signal.SIGKILL)

            if place == "between steps":
                from promedical.policy.gold import GoldWatch

                # After step 1's checkpoint, before step 2 is kept.
                monkeypatch.setattr(GoldWatch, "step_end", _on_step(2, die))
            elif place == "grading":
                monkeypatch.setattr(compare, "grade_answers", die)
            else:
                monkeypatch.setattr(compare, "_report", die)
            compare_policies(broken)

        return run

    for place in ("grading", "between steps", "report"):
        killed_in(kill_at(place))
    # Stages that were finished are not done again.
    monkeypatch.setattr(compare_training, "train_policy", lambda *_: pytest.fail("trained again"))
    found = compare_policies(broken)
    for key in ("systems", "comparisons", "answers"):
        assert found[key] == whole[key], key

    def steady(result: dict[str, Any]) -> list[Any]:
        kept = [
            {k: v for k, v in point.items() if not k.endswith("seconds")}
            for run in result["curves"]
            for point in [*run["curve"], *run["gold"]]
        ]
        return kept

    assert steady(found) == steady(whole)


def _on_step(step: int, act: Callable[[], None]) -> Callable[..., None]:
    def step_end(self: Any, state: Any, *_: Any) -> None:
        if state.global_step == step:
            act()

    return step_end


def test_a_run_that_stopped_early_reports_what_there_is(
    tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    chosen = recipe(tmp_path / "run", tiny, data, seeds=(0, 1), watch_every=0)

    def train(run: Run, system: str, seed: int, move: Any) -> dict[str, Any]:
        if seed == 1:
            raise KeyboardInterrupt
        return real(run, system, seed, move)

    real = compare_training.train_policy
    monkeypatch.setattr(compare_training, "train_policy", train)
    with pytest.raises(KeyboardInterrupt):
        compare_policies(chosen)
    # The same command with --report, from a recipe file.
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(json.loads((Path(chosen.out) / "recipe.json").read_text())))
    assert main([str(file), "--report", "--out", chosen.out]) == 0
    said = capsys.readouterr().out
    assert "Not finished: 2 stages are missing." in said
    assert "(1 seed)" in (Path(chosen.out) / "tables.md").read_text()
    assert main([str(file), "--plan", "--out", chosen.out]) == 0
    assert "6 of 9 stages done" in capsys.readouterr().out


# --- data and judges ------------------------------------------------------------------------------


def test_sides_share_no_instruction(tiny: Path, data: Path, tmp_path: Path) -> None:
    summary = build_data(recipe(tmp_path, tiny, data), tmp_path / "data", lambda *_: None)
    ids = {name: {r.id for r in read_dataset(tmp_path / "data" / name)} for name in
           ("judge", "gold", "calibration", "bench", "prompts")}  # fmt: skip
    assert ids["prompts"] == ids["judge"] | ids["gold"]
    apart = [ids[name] for name in ("judge", "gold", "calibration", "bench")]
    assert sum(map(len, apart)) == len(set().union(*apart)) == 16
    assert {len(ids["judge"]), len(ids["gold"])} == {4}
    assert summary["sides"]["bench"]["responses"] == 0
    assert summary["left_out"]["rows too close to the bench side"] == 0


def test_rows_that_cannot_be_used_are_counted_or_refused(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = rows(16)
    given[3] = replace(given[3], responses=given[3].responses[:1])
    given[4] = replace(given[4], rubric=None, responses=())
    copy = next(r for r in given if r.responses)
    given.append(replace(copy, id="q99"))
    write_dataset(tmp_path / "rows", given)
    monkeypatch.setenv("GRADED_DATA", str(tmp_path))
    chosen = recipe(tmp_path, tiny, Path("$GRADED_DATA/rows"))
    left_out = build_data(chosen, tmp_path / "data", lambda *_: None)["left_out"]
    assert left_out["rows without a rubric or without two graded answers"] == 2
    monkeypatch.delenv("GRADED_DATA")
    with pytest.raises(CompareError, match="a variable in it is not set"):
        build_data(chosen, tmp_path / "data", lambda *_: None)
    write_dataset(tmp_path / "few", given[:2])
    with pytest.raises(CompareError, match="expected 2 or more"):
        build_data(recipe(tmp_path, tiny, tmp_path / "few"), tmp_path / "data", lambda *_: None)


def silent(*_: Any) -> None:
    """Progress that nobody sees."""


def bare(count: int, prefix: str) -> list[GradedInstruction]:
    """Questions with rubrics and no answers, other ones than `rows`."""
    rng = random.Random(prefix)
    found = []
    for n, row in enumerate(rows(count)):
        word = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=24))
        asked = (Message("user", f"{prefix} {word}"),)
        found.append(replace(row, id=f"{prefix}{n}", messages=asked, responses=()))
    return found


def changed(chosen: CompareRecipe, **settings: Any) -> CompareRecipe:
    return replace(chosen, data=replace(chosen.data, **settings))


def turns(folder: Path) -> set[str]:
    return {" ".join(r.messages[-1].content.casefold().split()) for r in read_dataset(folder)}


def test_policies_have_questions_and_a_bench_of_their_own(
    tiny: Path, data: Path, tmp_path: Path
) -> None:
    asked = bare(6, "why")
    talk = replace(asked[0], id="talk", messages=(
        Message("user", "Hello"), Message("assistant", "Yes?"), *rows(16)[5].messages,
    ))  # fmt: skip
    write_dataset(tmp_path / "prompts", [*asked, talk, replace(asked[1], id="none", rubric=None)])
    veto = Rubric((Criterion("v", Tier.VETO, "It harms.", kind=VetoKind.HARMFUL_ADVICE),), True)
    safety = replace(asked[4], id="safety", rubric=veto)  # which gives no reward
    write_dataset(tmp_path / "bench", [*bare(5, "how"), replace(asked[3], id="again"), safety])
    chosen = changed(
        recipe(tmp_path, tiny, data),
        prompts=str(tmp_path / "prompts"),
        bench=str(tmp_path / "bench"),
        bench_instructions=9,
        train_instructions=12,
    )
    summary = build_data(chosen, tmp_path / "data", silent)
    side = {name: turns(tmp_path / "data" / name) for name in summary["sides"]}
    # Judges learn from all of `rows`; the bench is the file's, and took one of the prompts.
    assert len(side["judge"] | side["gold"] | side["calibration"]) == 16
    assert len(side["bench"]) == 6
    assert summary["sides"]["prompts"]["instructions"] == 5
    assert summary["sides"]["prompts"]["responses"] == 0
    apart = ("judge", "gold", "calibration", "prompts", "bench")
    assert sum(len(side[name]) for name in apart) == len(set().union(*(side[n] for n in apart)))
    assert side["watched"] <= side["calibration"]
    left_out = summary["left_out"]
    assert left_out["prompts that another side asks too"] == 2
    assert left_out["rows of prompts without a rubric that gives a reward"] == 1
    assert left_out["rows of bench without a rubric that gives a reward"] == 1


def test_one_file_can_have_prompts_and_bench(tiny: Path, data: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "asked", bare(9, "why"))
    path = str(tmp_path / "asked")
    chosen = changed(recipe(tmp_path, tiny, data), prompts=path, bench=path)
    summary = build_data(chosen, tmp_path / "data", silent)
    counts = {name: found["instructions"] for name, found in summary["sides"].items()}
    assert (counts["bench"], counts["prompts"]) == (4, 5)
    again = build_data(chosen, tmp_path / "again", silent)
    assert again["sides"] == summary["sides"]


def test_conversations_that_end_alike_are_on_one_side(tiny: Path, tmp_path: Path) -> None:
    given = [
        replace(row, id=f"{row.id}-{n}", messages=(Message("user", said), Message("assistant", "?"),
                                                   *row.messages))
        for row in rows(12)
        for n, said in enumerate(("Good day", "Hello"))
    ]  # fmt: skip
    write_dataset(tmp_path / "rows", given)
    chosen = changed(recipe(tmp_path, tiny, tmp_path / "rows"), train_instructions=99)
    summary = build_data(chosen, tmp_path / "data", silent)
    sides = [turns(tmp_path / "data" / n) for n in ("judge", "gold", "calibration", "bench")]
    assert sum(map(len, sides)) == len(set().union(*sides)) == 12
    left_out = summary["left_out"]
    kept = sum(summary["sides"][n]["instructions"] for n in ("judge", "gold", "calibration"))
    assert kept + 4 + left_out["rows too close to the bench side"] + left_out[
        "rows that the calibration side asks too"
    ] == len(given)


def test_questions_too_long_for_the_policy_are_left_out_and_told(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = rows(16)
    for n in (2, 3, 4):
        long = Message("user", given[n].messages[0].content + " and so on" * 250)
        given[n] = replace(given[n], messages=(long,))
    write_dataset(tmp_path / "rows", given)
    chosen = recipe(tmp_path / "run", tiny, tmp_path / "rows")
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(compare.plain_settings(chosen)))
    assert main([str(file), "--plan", "--out", chosen.out]) == 0
    planned = [s for s in capsys.readouterr().out.splitlines() if "has no room for" in s]
    summary = build_data(chosen, tmp_path / "data", silent)
    assert planned == [
        line for line in left_out_lines(summary["left_out"]) if "has no room for" in line
    ]
    found = {name: read_dataset(tmp_path / "data" / name) for name in summary["sides"]}
    for name in ("prompts", "bench", "watched"):
        assert all(len(row.messages[0].content) < 100 for row in found[name])
    # Judges read them all the same.
    judged = [*found["judge"], *found["gold"], *found["calibration"]]
    assert len([row for row in judged if len(row.messages[0].content) > 100]) == 3
    assert summary["left_out"]["prompts that the policy has no room for"] >= 1


def test_a_plan_says_that_the_data_is_not_there(tiny: Path, tmp_path: Path) -> None:
    lines = plan_lines(recipe(tmp_path, tiny, tmp_path / "$NO_SUCH_VARIABLE"))
    assert "the data cannot be used yet: data.rows: found" in lines[-1]


@pytest.mark.parametrize(
    ("system", "tier"), [("no_veto", "veto"), ("no_bonus_margin", "excellence"),
                         ("no_safety_data", "veto")]
)  # fmt: skip
def test_an_ablation_of_what_is_not_there_is_refused(
    system: str, tier: str, tiny: Path, tmp_path: Path
) -> None:
    given = [row.rubric.restricted_to({c.id for c in row.rubric.criteria if c.tier.value != tier})
             for row in rows(16) if row.rubric]  # fmt: skip
    without = [
        replace(row, rubric=rubric, responses=tuple(
            replace(r, verdicts={c.id: r.verdicts[c.id] for c in rubric.criteria})
            for r in row.responses
        ))
        for row, rubric in zip(rows(16), given, strict=True) if rubric
    ]  # fmt: skip
    write_dataset(tmp_path / "rows", without)
    chosen = recipe(tmp_path, tiny, tmp_path / "rows")
    build_data(chosen, tmp_path / "data", silent)
    with pytest.raises(CompareError, match=f"'{system}', but none of the .* tier {tier}"):
        build_data(replace(chosen, systems=("base", "promedical", system)), tmp_path / "d", silent)


@pytest.mark.parametrize(
    ("verdict", "message"),
    [
        (Verdict.UNMET, "0 labels met and 32 unmet in the tier veto"),
        (Verdict.MET, "32 labels met and 0 unmet in the tier veto"),
    ],
)
def test_labels_that_set_no_threshold_are_refused_before_anything_is_trained(
    verdict: Verdict, message: str, tiny: Path, tmp_path: Path
) -> None:
    alike = [
        replace(row, responses=tuple(
            replace(r, verdicts=r.verdicts | {"v": verdict, "w": verdict}) for r in row.responses
        ))
        for row in rows(16)
    ]  # fmt: skip
    write_dataset(tmp_path / "rows", alike)
    chosen = recipe(tmp_path, tiny, tmp_path / "rows")
    with pytest.raises(CompareError, match=message):
        build_data(chosen, tmp_path / "data", silent)
    given = replace(chosen.judges, explicit="one", gold="other")  # trained and calibrated before
    build_data(replace(chosen, judges=given), tmp_path / "data", silent)


def test_of_judges_that_only_train_the_last_one_stays(
    tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(
        compare_judges, "load_judge", lambda _, name, __: (loaded.append(name), name)
    )
    run = Run(recipe(tmp_path, tiny, data, graders=("gold", "explicit")))
    for name in ("gold", "explicit", "scalar", "no_safety_data", "explicit", "gold", "scalar"):
        run.judge(name)
    assert loaded == ["gold", "explicit", "scalar", "no_safety_data", "scalar"]


def test_copies_of_a_question_stay_in_one_half() -> None:
    questions = {f"q{i}": [replace(r, id=f"q{i}#{c}") for c in (0, 1)]
                 for i, r in enumerate(rows(5))}  # fmt: skip
    first, second = _halves(questions)
    ids = [{r.id.partition("#")[0] for r in half} for half in (first, second)]
    assert not ids[0] & ids[1]
    assert (len(first), len(second)) == (6, 4)
    assert _halves(dict(reversed(questions.items()))) == (first, second)


def test_a_judge_that_fails_leaves_an_answer_ungraded() -> None:
    class Failing:
        def grade(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError(SECRET)

    (item,) = grade_answers(Failing(), rows(1), ["text"], RewardSpec(), point="reward",
                            progress=lambda *_: None)  # fmt: skip
    assert item.reward is None
    assert item.instruction_id == "q0"


def test_the_same_answer_is_graded_once_and_a_failure_again() -> None:
    class Counting:
        calls = 0

        def grade(self, _: Any, __: Any, rubric: Rubric, operating_point: str) -> Any:
            self.calls += 1
            assert operating_point == "audit"
            if self.calls == 1:
                raise RuntimeError("out of memory")
            raw = dict.fromkeys((c.id for c in rubric.criteria), 1.0)
            return [to_grade(rubric, Calibration.uncalibrated(), raw, {}, operating_point="reward")]

    grader, known = Counting(), {}  # type: ignore[var-annotated]
    for calls, graded in ((1, False), (2, True), (2, True)):
        (item,) = grade_answers(
            grader,
            rows(1),
            ["text"],
            RewardSpec(),
            point="audit",
            known=known,
            progress=lambda *_: None,
        )
        assert grader.calls == calls
        assert (item.reward is not None) is graded


@pytest.mark.parametrize(
    ("adapter", "keep", "left"), [(True, False, False), (False, False, True), (True, True, True)]
)
def test_only_weights_that_an_adapter_has_too_are_removed(
    adapter: bool, keep: bool, left: bool, tiny: Path, data: Path, tmp_path: Path
) -> None:
    run = Run(recipe(tmp_path, tiny, data, keep_policies=keep))
    folder = run.policy_folder("promedical", 0)
    (folder / "policy").mkdir(parents=True)
    if adapter:
        (folder / "adapter").mkdir()
    compare._forget("promedical", 0, run)
    assert (folder / "policy").exists() is left


def test_the_gold_judge_decides_by_its_own_point_and_training_judges_by_the_rewards() -> None:
    assert CompareRecipe().point("gold") == "reward"
    audit = CompareRecipe(judges=JudgeSettings(gold_point="audit"))
    assert (audit.point("gold"), audit.point("explicit")) == ("audit", "reward")


def test_alarms_of_the_watch_are_kept(tmp_path: Path) -> None:
    assert compare_training._looks(tmp_path)["alarms"] == []
    (tmp_path / "watch").mkdir()
    alarm = {"kind": "over_optimised", "step": 150, "change": {"value": 0.1}, "says": "step 150: …"}
    (tmp_path / "watch" / "alarms.json").write_text(json.dumps([alarm]))
    found = compare_training._looks(tmp_path)
    assert found["alarms"] == [{"kind": "over_optimised", "step": 150}]


# --- recipes and folders --------------------------------------------------------------------------


def test_ablations_change_what_their_names_say() -> None:
    spec = RewardSpec()
    changed = {name: system.reward(spec) for name, system in SYSTEMS.items()}
    assert changed["no_veto"] == RewardSpec(lam=0.0, ablation="no_veto")
    assert changed["no_bonus_margin"] == RewardSpec(beta=0.0, ablation="no_bonus_margin")
    others = set(SYSTEMS) - {"no_veto", "no_bonus_margin"}
    assert {name for name in SYSTEMS if changed[name] == spec} == others
    assert SYSTEMS["no_safety_data"].judge == "no_safety_data"
    assert [n for n, s in SYSTEMS.items() if s.soft] == ["soft_s1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"systems": ("promedical",)}, "expected 'base' among them"),
        ({"systems": ("base", "dpo")}, "reference: found 'promedical'"),
        ({"seeds": (1, 1)}, "each once"),
        ({"graders": ("explicit",)}, "expected 'gold'"),
        ({"graders": ("gold", "scalar")}, "no scalar"),
        ({"answer_tokens": 0}, "answer_tokens: found 0"),
    ],
)
def test_recipes_that_cannot_be_compared_with(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CompareRecipe(), **changes)


def test_the_gold_judge_is_another_one() -> None:
    with pytest.raises(ValueError, match="which is a training judge too"):
        JudgeSettings(explicit="rm", gold="rm")


def test_another_run_is_refused(tiny: Path, data: Path, tmp_path: Path) -> None:
    mine = recipe(tmp_path, tiny, data)
    Run(mine).claim()
    Run(replace(mine, costs=replace(mine.costs, step=1.0))).claim()  # costs are no settings
    with pytest.raises(CompareError, match=r"other settings \(answer_tokens, seeds\)"):
        Run(replace(mine, seeds=(3,), answer_tokens=9)).claim()


def test_the_plan_adds_up_and_learns_from_what_is_done(
    tiny: Path, data: Path, tmp_path: Path
) -> None:
    chosen = recipe(tmp_path, tiny, data, seeds=(0, 1, 2))
    listed = stages(chosen)
    assert len({stage.name for stage in listed}) == len(listed)
    assert [s.name for s in listed if s.kind == "train"] == [
        "train-promedical-0", "train-promedical-1", "train-promedical-2",
    ]  # fmt: skip
    compare.write_json(
        Run(chosen).stage_file("train-promedical-0"), {"result": {}, "seconds": 7.0, "code": {}}
    )
    lines = plan_lines(chosen)
    shown = [line.rsplit("  ", 1)[1].strip() for line in lines if "training" in line]
    assert shown == ["done in 7 s", "about 7 s", "about 7 s"]


def test_unknown_settings_are_named(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("sistems: [base]\n")
    with pytest.raises(RecipeError, match="systems"):
        main([str(file), "--plan"])


def test_committed_recipes_can_be_planned(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(__file__).parents[1] / "recipes" / "policy"
    for path in sorted(folder.glob("compare-*.yaml")):
        assert main([str(path), "--plan"]) == 0
        assert "stages done" in capsys.readouterr().out
