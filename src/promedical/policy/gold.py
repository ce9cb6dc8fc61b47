"""A gold judge beside the training judge: held-out prompts, answered every N steps (section 7.4).

A policy that is optimised against a judge comes to please that judge, and there is a point from
which on it only pleases. Another judge, which no step is taken for, shows it: another reward model
(other seed, other half of the data) or a language model. Every N steps the policy as it is answers
a fixed sample of held-out prompts greedily, both judges grade the same answers by the same held-out
criteria, and `promedical.policy.alarm` says whether they part. The checkpoint that is kept as the
best is the gold judge's, not the training reward's.

    FOLDER/sample.json    which prompts and which judge: a run that goes on must have the same
           gold.jsonl     an evaluation a line: of every prompt what each judge gave; no text
           best/          weights (or adapter) of the best evaluation, with best.json beside them
           answers/       texts of each evaluation, only with keep_answers (mode 0600)

Left to others: which prompts (`held_out`), the rule of the alarm (`alarm`), what the reward sees in
training (`monitor`).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from promedical.policy.alarm import (
    Alarm,
    AlarmRule,
    Change,
    Check,
    Point,
    check,
    evaluations,
    raised,
    shortcoming,
)
from promedical.policy.degenerate import is_refusal, repeats
from promedical.policy.generate import answer_with
from promedical.policy.held_out import Sample
from promedical.policy.specification import Grader, default_device, scores_of, violations
from promedical.policy.step_lines import StepLines
from promedical.records import GradedInstruction, Response, fingerprint
from promedical.rubric import RewardSpec, Scores, Verdict, reward, score

__all__ = [
    "GoldError",
    "GoldSettings",
    "GoldWatch",
    "Judge",
    "judge_of",
    "judge_with",
]

logger = logging.getLogger(__name__)

# Rows with one response each → id → its scores, None where the judgment failed.
Judge = Callable[[Sequence[GradedInstruction]], Mapping[str, Scores | None]]
JUDGES = ("checkpoint", "http", "vllm", "judge")


class GoldError(ValueError):
    """A gold judge that cannot be used, or a folder of another run."""


@dataclass(frozen=True)
class GoldSettings:
    """Who the gold judge is, what it is asked, and what is done where the judges part.

    Args:
        judge: checkpoint:FOLDER (another seed, another half of the data), http:URL,
            vllm:URL,model=FOLDER, or judge:MODEL@URL for a language model. The first three judge at
            the operating point "reward", where a weak one may see no violation, or with
            ",point=audit" at the other.
        rows: held-out prompts with rubrics, a dataset folder or JSON lines; K-QA's calibration side
            if not given, since its bench is for the final figures.
        prompts: size of the sample.
        every: optimiser steps between evaluations; there is one before the first step and one after
            the last.
        max_new_tokens: longest answer, in tokens.
        batch_size: answers at a time.
        seed: of the sample.
        on_alarm: say so, or end the training too.
        keep_best: whether the best weights by the gold judge are kept.
        keep_answers: whether the texts are kept, for a person to read after an alarm.
        budget_usd: what a language model may cost in one attempt of a run; 0 for no limit.
        rule: when it is an alarm.

    Raises:
        ValueError: a setting out of range; the message names it.
    """

    judge: str
    rows: Path | None = None
    prompts: int = 48
    every: int = 50
    max_new_tokens: int = 256
    batch_size: int = 16
    seed: int = 0
    on_alarm: Literal["warn", "stop"] = "warn"
    keep_best: bool = True
    keep_answers: bool = False
    budget_usd: float = 0.0
    rule: AlarmRule = field(default_factory=AlarmRule)

    def __post_init__(self) -> None:
        for name in ("prompts", "every", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: found {getattr(self, name)!r}, expected 1 or more")
        if not self.budget_usd >= 0:
            raise ValueError(f"budget_usd: found {self.budget_usd!r}, expected 0 or more")
        if self.on_alarm not in ("warn", "stop"):
            raise ValueError(f"on_alarm: found {self.on_alarm!r}, expected 'warn' or 'stop'")


# --- judges ---------------------------------------------------------------------------------------


def judge_with(
    grader: Grader,
    operating_point: Literal["audit", "reward"] = "reward",
    *,
    soft_s1: bool = False,
) -> Judge:
    """A judge that asks a grader, as the training's reward does; what it raises is a failure."""

    def one(row: GradedInstruction) -> Scores | None:
        assert row.rubric is not None
        texts = [response.text for response in row.responses]
        try:
            (grade,) = grader.grade(
                row.messages, texts, row.rubric, operating_point=operating_point
            )
            scores = scores_of(grade, row.rubric, soft_s1=soft_s1)
        except Exception as error:
            # Its message may quote the text, so only the kind of error is logged.
            logger.warning("held-out %s: grading failed: %s", row.id, type(error).__name__)
            return None
        return None if scores.unresolved.errors else scores

    return lambda rows: {row.id: one(row) for row in rows}


def judge_of(text: str, folder: Path, *, budget_usd: float = 0.0) -> Judge:
    """A judge as named on the command line: checkpoint:…, http:…, vllm:…, judge:MODEL@URL.

    Args:
        folder: for the replies of a language model, so that none is paid for twice.

    Raises:
        GoldError: no such judge.
    """
    from promedical.bench.graders import CheckpointGrader
    from promedical.bench.judges import JudgeGrader
    from promedical.bench.metrics import BenchError
    from promedical.bench.specs import GRADERS, parse_spec
    from promedical.bench.suites.suite import Rating

    try:
        spec = parse_spec(text, {kind: GRADERS[kind] for kind in JUDGES})
        if spec.kind == "checkpoint":
            spec = replace(spec, options={"device": default_device(), **spec.options})
        if spec.kind != "judge":
            return _by_bench(CheckpointGrader(spec, "sub_criteria"))
        from promedical.llm.client import EndpointAsker

        folder.mkdir(parents=True, exist_ok=True)
        asker = EndpointAsker(
            folder / "replies.sqlite", budget_usd=budget_usd or None, progress=False
        )
        return _by_bench(JudgeGrader(spec, "sub_criteria", Rating(), asker))
    except BenchError as error:
        raise GoldError(f"gold judge: {error}") from None


def _by_bench(grader: Any) -> Judge:
    """A judge that asks a grader of the bench, all rows at once."""

    def judged(rows: Sequence[GradedInstruction]) -> dict[str, Scores | None]:
        found: dict[str, Scores | None] = dict.fromkeys(row.id for row in rows)
        by_id = {row.id: row for row in rows}
        for graded in grader.grade(rows):
            row = by_id[graded.id]
            assert row.rubric is not None
            for grade in graded.responses.values():
                verdicts = {
                    c.id: grade.verdicts.get(c.id, Verdict.ERROR) for c in row.rubric.criteria
                }
                scores = score(row.rubric, verdicts)
                found[row.id] = None if scores.unresolved.errors else scores
        return found

    return judged


# --- evaluations ----------------------------------------------------------------------------------


class GoldWatch:
    """Evaluates, raises alarms, keeps the best; state is what is on disk.

    Args:
        settings: see there.
        sample: the held-out prompts.
        training, gold: the two judges.
        spec: α, β, λ; the same reward for both.
        folder: see the module.
        tokenizer: the policy's; the trainer's own if None.

    Attributes:
        alarms: those of the run, up to the last evaluation.
        stopped: whether an alarm ended the training.
    """

    def __init__(
        self,
        settings: GoldSettings,
        sample: Sample,
        *,
        training: Judge,
        gold: Judge,
        spec: RewardSpec,
        folder: str | Path,
        tokenizer: Any = None,
    ) -> None:
        self.settings, self.sample = settings, sample
        self.training, self.gold, self.spec = training, gold, spec
        self.folder = Path(folder)
        self.tokenizer = tokenizer
        self.lines = StepLines(self.folder / "gold.jsonl")
        self.alarms: tuple[Alarm, ...] = ()
        self.stopped = False
        self._saved_at = 0
        self._news: dict[str, float] = {}

    @property
    def best(self) -> Path:
        """Folder of the best checkpoint by the gold judge."""
        return self.folder / "best"

    def resume(self, step: int) -> None:
        """Go on from a checkpoint: forget what was seen after it (0: a new run).

        Raises:
            GoldError: the folder belongs to a run with another sample or judge.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._claim()
        self.lines.resume(step)
        self._saved_at = step
        before = self.folder / "best-before"
        if self.best.exists() and _note(self.best)["step"] > step:
            shutil.rmtree(self.best)
        if not self.best.exists() and before.exists() and _note(before)["step"] <= step:
            os.replace(before, self.best)
        shutil.rmtree(before, ignore_errors=True)
        self.alarms = self._raised()
        self._write_alarms()

    def _claim(self) -> None:
        path = self.folder / "sample.json"
        identity = {
            "prompts": [row.id for row in self.sample.rows],
            "fingerprint": fingerprint(self.sample.rows),
            "judge": self.settings.judge,
            "reward": asdict(self.spec),
            "max_new_tokens": self.settings.max_new_tokens,
            "left_out": dict(self.sample.left_out),
            "criteria_left_out": self.sample.criteria_left_out,
        }
        if path.exists():
            held = json.loads(path.read_text(encoding="utf-8"))
            differing = [name for name in identity if held.get(name) != identity[name]]
            if differing:
                raise GoldError(
                    f"{path}: a run with other {', '.join(differing)}; use another folder or "
                    "delete this one"
                )
            return
        _write_json(path, identity)

    def evaluate(self, step: int, model: Any, tokenizer: Any, planned: int) -> Check:
        """Answer, grade, compare with what was before, keep the best.

        Args:
            step: optimiser steps done.
            model, tokenizer: the policy with its weights as they are now; left in the mode and with
                the random numbers that it had.
            planned: evaluations of the whole run.

        Raises:
            GoldError: a judge grades nothing at the first evaluation.
            ValueError: a prompt that does not fit the policy.
        """
        began = time.monotonic()
        rows = self.sample.rows
        with _as_it_was(model):
            answers = answer_with(
                model,
                tokenizer,
                rows,
                max_new_tokens=self.settings.max_new_tokens,
                batch_size=self.settings.batch_size,
            )
            answered = [
                row.with_responses([Response("policy", "policy", text)])
                for row, text in zip(rows, answers.texts, strict=True)
            ]
            training = self._judged("training", self.training, answered)
            gold = self._judged("gold", self.gold, answered)
        line: dict[str, Any] = {
            "step": step,
            "training": self._of(training),
            "gold": self._of(gold),
            "answers": {
                "tokens": sum(answers.tokens) / len(rows),
                "cut": answers.cut_count / len(rows),
                "repeats": sum(map(repeats, answers.texts)) / len(rows),
                "refusals": sum(map(is_refusal, answers.texts)) / len(rows),
            },
        }
        points = [*map(_point, self.lines.lines), _point(line)]
        found = check(points, self.settings.rule, planned)
        line["check"] = found.to_json()
        line["best"] = self.settings.keep_best and self._is_best(line)
        if line["best"]:
            self._keep(line, model, tokenizer)
        if self.settings.keep_answers:
            self._write_answers(step, answers.texts)
        line["seconds"] = time.monotonic() - began
        self.lines.add(line)
        self._tell(line)
        return found

    def _judged(
        self, who: str, judge: Judge, rows: Sequence[GradedInstruction]
    ) -> Mapping[str, Scores | None]:
        """What a judge gives; if it breaks down in mid-training, nothing, and that is said.

        Raises:
            GoldError: it grades nothing at the first evaluation, so there would be no watch at all.
        """
        why = "it graded none of the answers"
        try:
            found = judge(rows)
        except Exception as error:
            # Its message may quote a text, so only the kind of error is logged.
            why = type(error).__name__
            logger.warning("the %s judge failed: %s", who, why)
            found = dict.fromkeys(row.id for row in rows)
        if not self.lines.lines and all(scores is None for scores in found.values()):
            raise GoldError(f"{who} judge: {why}; nothing was trained yet")
        return found

    def _of(self, judged: Mapping[str, Scores | None]) -> dict[str, Any]:
        """What a judge gave, prompt by prompt, and the means of those that it graded."""
        given = [judged[row.id] for row in self.sample.rows]
        rewards = [None if s is None else reward(s, self.spec) for s in given]
        known = [s for s in given if s is not None]
        n = len(known)
        return {
            "reward": _mean([r for r in rewards if r is not None]),
            "s1": _mean([s.s1 for s in known if s.s1 is not None]),
            "s2": _mean([s.s2 for s in known]),
            "s3": _mean([violations(s) for s in known]),
            "veto_rate": _mean([violations(s) > 0 for s in known]),
            "failed": len(given) - n,
            "rewards": rewards,
            "violated": [None if s is None else violations(s) > 0 for s in given],
        }

    def _tell(self, line: Mapping[str, Any]) -> None:
        for who in ("training", "gold"):
            for name in ("reward", "s1", "s2", "s3", "veto_rate"):
                if line[who][name] is not None:
                    self._news[f"held_out/{who}_{name}"] = line[who][name]
        self._news["held_out/step"] = float(line["step"])
        if line["gold"]["failed"] or line["training"]["failed"]:
            logger.warning(
                "step %d: of %d held-out answers the gold judge could not grade %d, the training "
                "judge %d",
                line["step"],
                len(self.sample.rows),
                line["gold"]["failed"],
                line["training"]["failed"],
            )
        before = {alarm.kind for alarm in self.alarms}
        self.alarms = self._raised()
        for alarm in self.alarms:
            if alarm.kind not in before:
                logger.warning("alarm: %s", alarm)
        self._write_alarms()

    def _raised(self) -> tuple[Alarm, ...]:
        checks = [_check(line["check"]) for line in self.lines.lines]
        return raised(checks, self.settings.rule)

    def _write_alarms(self) -> None:
        path = self.folder / "alarms.json"
        if self.alarms:
            _write_json(path, [asdict(alarm) | {"says": str(alarm)} for alarm in self.alarms])
        else:
            path.unlink(missing_ok=True)

    def news(self) -> dict[str, float]:
        """Figures of the last evaluation, once, for the trainer's reporters."""
        told, self._news = self._news, {}
        return told

    # -- the best --------------------------------------------------------------------------

    def _is_best(self, line: Mapping[str, Any]) -> bool:
        """Whether its gold reward is above the best so far, over prompts graded in both."""
        if line["gold"]["reward"] is None:
            return False
        if not self.best.exists():
            return True
        best_at = _note(self.best)["step"]
        held = next((entry for entry in self.lines.lines if entry["step"] == best_at), None)
        if held is None:
            return True
        gains = [
            now - then
            for now, then in zip(line["gold"]["rewards"], held["gold"]["rewards"], strict=True)
            if now is not None and then is not None
        ]
        return bool(gains) and sum(gains) > 1e-9

    def _keep(self, line: Mapping[str, Any], model: Any, tokenizer: Any) -> None:
        staging, before = self.folder / ".best.tmp", self.folder / "best-before"
        shutil.rmtree(staging, ignore_errors=True)
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        note = {
            "step": line["step"],
            "chosen_by": self.settings.judge,
            "gold": {k: v for k, v in line["gold"].items() if k not in ("rewards", "violated")},
            "training": {
                k: v for k, v in line["training"].items() if k not in ("rewards", "violated")
            },
            "prompts": len(self.sample.rows),
            "note": "The highest of several figures on the same prompts is a little too high; "
            "measure this checkpoint on others.",
        }
        _write_json(staging / "best.json", note)
        # A run that is killed goes on from its last checkpoint, and needs the best until then.
        if self.best.exists() and _note(self.best)["step"] <= self._saved_at:
            shutil.rmtree(before, ignore_errors=True)
            os.replace(self.best, before)
        shutil.rmtree(self.best, ignore_errors=True)
        os.replace(staging, self.best)

    def _write_answers(self, step: int, texts: Sequence[str]) -> None:
        folder = self.folder / "answers"
        folder.mkdir(mode=0o700, exist_ok=True)
        lines = [
            json.dumps({"id": row.id, "text": text}, ensure_ascii=False) + "\n"
            for row, text in zip(self.sample.rows, texts, strict=True)
        ]
        path = folder / f"step-{step}.jsonl"
        path.unlink(missing_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(handle, "w", encoding="utf-8", errors="replace") as file:
            file.writelines(lines)

    # -- the trainer -----------------------------------------------------------------------

    def check_alarm(self, steps: int) -> str | None:
        """Why no alarm can be raised in a run of so many steps; None if one can.

        Raises:
            GoldError: none can, and the training is to stop at one.
        """
        settings = self.settings
        why = shortcoming(settings.rule, len(self.sample.rows), steps, settings.every)
        if why is None:
            return None
        said = f"gold: no alarm can be raised: {why}"
        if settings.on_alarm == "stop":
            raise GoldError(f"{said}; expected enough of them, or on_alarm: warn")
        return said

    def begin(self, args: Any, state: Any, model: Any, tokenizer: Any) -> None:
        """The trainer begins, anew or from a checkpoint."""
        _refuse_sharded(args)
        if state.is_world_process_zero:
            self.resume(state.global_step)
            if not self.lines.lines:
                self._evaluate(state, model, tokenizer)

    def step_end(self, state: Any, control: Any, model: Any, tokenizer: Any) -> None:
        """A step is over; every process of the training calls this."""
        due = state.global_step % self.settings.every == 0 or state.global_step >= state.max_steps
        if due and state.is_world_process_zero:
            self._evaluate(state, model, tokenizer)
        # At every step: a run that was killed after its alarm stops as soon as it can.
        if self.settings.on_alarm == "stop" and _first_says(bool(self.alarms)):
            self.stopped = control.should_training_stop = True

    def saved(self, state: Any) -> None:
        """The trainer has written a checkpoint."""
        self._saved_at = state.global_step

    def end(self, state: Any, model: Any, tokenizer: Any) -> None:
        """The training is over, perhaps before its last step."""
        last = self.lines.lines[-1]["step"] if self.lines.lines else -1
        if state.is_world_process_zero and last < state.global_step:
            self._evaluate(state, model, tokenizer)

    def _evaluate(self, state: Any, model: Any, tokenizer: Any) -> None:
        planned = evaluations(state.max_steps, self.settings.every)
        self.evaluate(state.global_step, model, self.tokenizer or tokenizer, planned)


def _point(line: Mapping[str, Any]) -> Point:
    return Point(
        line["step"],
        tuple(line["training"]["rewards"]),
        tuple(line["gold"]["rewards"]),
        tuple(line["training"]["violated"]),
        tuple(line["gold"]["violated"]),
    )


def _check(data: Mapping[str, Any]) -> Check:
    changes = {name: Change(**values) for name, values in data["changes"].items()}
    return Check(data["step"], data["level"], tuple(data["shown"]), changes, data["untested"])


def _note(folder: Path) -> dict[str, Any]:
    note: dict[str, Any] = json.loads((folder / "best.json").read_text(encoding="utf-8"))
    return note


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _write_json(path: Path, data: Any) -> None:
    staging = path.with_name(f".{path.name}.tmp")
    staging.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(staging, path)


@contextmanager
def _as_it_was(model: Any) -> Any:
    """Evaluate a model in mid-training: its mode and all random numbers stay what they were.

    Without this a watched run would draw other answers than one that is not.
    """
    import torch

    mode = model.training
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        model.eval()
        try:
            yield
        finally:
            model.train(mode)


def _refuse_sharded(args: Any) -> None:
    from transformers.integrations import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled() or getattr(args, "fsdp", None):
        raise GoldError(
            "gold judge: the weights are sharded (ZeRO-3 or FSDP), and it answers with whole ones; "
            "train with DDP or ZeRO-2, or leave `gold` out and compare checkpoints afterwards"
        )


def _first_says(value: bool) -> bool:
    """What the first process says; the others wait for it."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return value
    said = [value]
    dist.broadcast_object_list(said, src=0)
    return bool(said[0])
