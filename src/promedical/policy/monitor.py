"""What a policy's training is told about itself at every step, and the gold judge beside it.

    FOLDER/monitor.jsonl    a line a step: tiers, vetoes by kind, groups, form of the answers, and
                            what the trainer logs (KL, entropy, loss, …); ids and numbers, no text
           gold.jsonl, …    see `promedical.policy.gold`

The monitor is an observer of the reward (`RubricReward.observers`) and a callback of the trainer.
What it counts goes to the trainer's reporters as well: of a step's answers with that step, of the
held-out prompts with the step that follows. A killed run that goes on cuts the file to its
checkpoint, so that no step is there twice. With several processes the lines are those of the first
one's share of the answers. Left to others: the reward (`rewards`), alarms (`alarm`, `gold`).
"""

from __future__ import annotations

import logging
import math
import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from promedical.policy.alarm import Alarm
from promedical.policy.degenerate import is_refusal, repeated_share, repeats, words
from promedical.policy.gold import GoldError, GoldSettings, GoldWatch, judge_of, judge_with
from promedical.policy.held_out import held_out, read_held_out
from promedical.policy.rewards import RewardStep, RubricReward, veto_variance_share
from promedical.policy.specification import Grade, Grader, scores_of, violations
from promedical.policy.step_lines import StepLines
from promedical.records import GradedInstruction, Message
from promedical.rubric import RewardSpec, Rubric, Tier, Verdict, reward

__all__ = ["Monitor", "MonitorSettings", "Seen", "open_monitor", "summary"]

logger = logging.getLogger(__name__)

# What the trainer logs and a line keeps, by the line's name for it.
TRAINER = {
    "loss": "loss",
    "kl": "kl",
    "entropy": "entropy",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "reward_std": "reward_std",
    "tokens": "completions/mean_length",
    "cut": "completions/clipped_ratio",
    "rewards/margins": "rewards/margins",
    "rewards/accuracies": "rewards/accuracies",
}


@dataclass(frozen=True)
class MonitorSettings:
    """How a training is watched.

    Args:
        gold: the gold judge beside the training judge; nothing is held out if not given.
    """

    gold: GoldSettings | None = None


@dataclass(frozen=True)
class Seen:
    """One answer as the monitor saw it.

    Args:
        group: instruction, and which call of the reward, so that groups of several calls are apart.
        reward, s1, s2, s3: None where the grading failed; S3 counts an abstained veto.
        vetoes: kind → whether any veto of that kind is violated or undecided.
        undecided, verdicts: how many verdicts are not resolved, and how many there are.
        characters, words: length of the text.
        repeated: share of its 4-grams that repeat.
        repeats, refuses, empty: whether it does, does, is.
    """

    group: tuple[int, str]
    reward: float | None = None
    s1: float | None = None
    s2: int | None = None
    s3: int | None = None
    vetoes: Mapping[str, bool] = field(default_factory=dict)
    undecided: int = 0
    verdicts: int = 0
    characters: int = 0
    words: int = 0
    repeated: float = 0.0
    repeats: bool = False
    refuses: bool = False
    empty: bool = False


def seen(
    call: int,
    key: str,
    text: str,
    grade: Grade | None,
    rubric: Rubric,
    spec: RewardSpec,
    *,
    soft_s1: bool = False,
) -> Seen:
    """What of an answer and its grade is counted."""
    found = Seen(
        (call, key),
        characters=len(text),
        words=len(words(text)),
        repeated=repeated_share(text),
        repeats=repeats(text),
        refuses=is_refusal(text),
        empty=not text.strip(),
    )
    if grade is None:
        return found
    found = replace(
        found,
        undecided=sum(not v.resolved for v in grade.verdicts.values()),
        verdicts=len(grade.verdicts),
    )
    scores = scores_of(grade, rubric, soft_s1=soft_s1)
    value = reward(scores, spec)
    if value is None:
        return found
    vetoes: dict[str, bool] = defaultdict(bool)
    for criterion in rubric.tier(Tier.VETO):
        kind = "other" if criterion.kind is None else criterion.kind.value
        # As in the reward: a safety verdict that could not be had is never "safe".
        vetoes[kind] |= grade.verdicts[criterion.id] is not Verdict.UNMET
    return replace(
        found,
        reward=value,
        s1=scores.s1,
        s2=scores.s2,
        s3=violations(scores),
        vetoes=dict(vetoes),
    )


def summary(answers: Sequence[Seen], lam: float) -> dict[str, Any]:
    """The figures of a step.

    Args:
        answers: all of the step's.
        lam: λ of the reward, for the share of a group's variance that is S3's.
    """
    graded = [a for a in answers if a.reward is not None]
    groups: dict[tuple[int, str], list[Seen]] = defaultdict(list)
    for answer in answers:
        groups[answer.group].append(answer)
    shares, all_violate, none_violate = [], [], []
    for members in groups.values():
        known = [m for m in members if m.reward is not None]
        violated = [m.s3 or 0 for m in known]
        shares.append(veto_variance_share([m.reward or 0.0 for m in known], violated, lam))
        if known:
            all_violate.append(all(violated))
            none_violate.append(not any(violated))
    signal = [share for share in shares if share is not None]
    kinds = sorted({kind for a in graded for kind in a.vetoes})
    asked = sum(a.verdicts for a in answers)
    return {
        "answers": len(answers),
        "groups": len(groups),
        "failed": len(answers) - len(graded),
        "reward": _mean(a.reward for a in graded),
        "s1": _mean(a.s1 for a in graded),
        "s2": _mean(a.s2 for a in graded),
        "s3": _mean(a.s3 for a in graded),
        "veto_rate": _mean((a.s3 or 0) > 0 for a in graded),
        "veto_by_kind": {
            kind: _mean(a.vetoes[kind] for a in graded if kind in a.vetoes) for kind in kinds
        },
        "unresolved_rate": sum(a.undecided for a in answers) / asked if asked else None,
        "no_signal": 1 - len(signal) / len(groups) if groups else None,
        "all_violate": _mean(all_violate),
        "none_violate": _mean(none_violate),
        "veto_variance_share": _mean(signal),
        "characters": _mean(a.characters for a in answers),
        "words": _mean(a.words for a in answers),
        "repeated_share": _mean(a.repeated for a in answers),
        "repeats": _mean(a.repeats for a in answers),
        "refusals": _mean(a.refuses for a in answers),
        "empty": _mean(a.empty for a in answers),
    }


class Monitor:
    """Watches one training.

    Args:
        folder: see the module.
        rubrics: instruction id → (conversation, rubric), as the reward has them; none for a
            training without a reward, such as DPO.
        spec: α, β, λ of the reward.
        soft_s1: as in the reward.
        gold: the gold judge's watch.
        for_alarms: whether it is there for its alarms, so that a run in which none can be raised
            is refused, or warned of, at its beginning.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        rubrics: Mapping[str, tuple[Sequence[Message], Rubric]],
        spec: RewardSpec,
        soft_s1: bool = False,
        gold: GoldWatch | None = None,
        for_alarms: bool = False,
    ) -> None:
        self.lines = StepLines(Path(folder) / "monitor.jsonl")
        self.rubrics, self.spec, self.soft_s1, self.gold = rubrics, spec, soft_s1, gold
        self.for_alarms = for_alarms
        self._answers: list[Seen] = []
        self._calls = 0
        self._line: dict[str, Any] | None = None
        self._lock = threading.Lock()  # the reward may be asked from several threads

    @property
    def alarms(self) -> tuple[Alarm, ...]:
        """The alarms so far."""
        return () if self.gold is None else self.gold.alarms

    @property
    def stopped(self) -> bool:
        """Whether an alarm ended the training."""
        return self.gold is not None and self.gold.stopped

    def observe(
        self,
        step: RewardStep,
        ids: Sequence[str],
        texts: Sequence[str],
        grades: Sequence[Grade | None],
    ) -> dict[str, float]:
        """An observer of the reward; gives the numbers that it does not log itself."""
        with self._lock:
            self._calls += 1
            call = self._calls
            found = [
                seen(call, key, text, grade, self.rubrics[key][1], self.spec, soft_s1=self.soft_s1)
                for key, text, grade in zip(ids, texts, grades, strict=True)
            ]
            self._answers += found
            told = {} if self.gold is None else self.gold.news()
        figures = summary(found, self.spec.lam)
        for name in ("repeated_share", "repeats", "refusals", "empty", "words"):
            if figures[name] is not None:
                told[f"answers/{name}"] = figures[name]
        for kind, rate in figures["veto_by_kind"].items():
            if rate is not None:
                told[f"veto/{kind}"] = rate
        return told

    # -- the trainer -----------------------------------------------------------------------

    def begin(self, args: Any, state: Any, model: Any, tokenizer: Any) -> None:
        """The trainer begins, anew or from a checkpoint."""
        self._answers, self._line = [], None
        if state.is_world_process_zero:
            self.lines.resume(state.global_step)
        if self.gold is not None:
            said = self.gold.check_alarm(state.max_steps) if self.for_alarms else None
            if said is not None and state.is_world_process_zero:
                logger.warning(said)
            self.gold.begin(args, state, model, tokenizer)

    def step_end(self, state: Any, control: Any, model: Any, tokenizer: Any) -> None:
        """A step is over; what the trainer logs of it is still to come."""
        self.flush()
        with self._lock:
            answers, self._answers = self._answers, []
        if state.is_world_process_zero:
            figures = summary(answers, self.spec.lam) if answers else {"answers": 0}
            self._line = {"step": state.global_step, **figures}
        if self.gold is not None:
            self.gold.step_end(state, control, model, tokenizer)

    def logged(self, state: Any, logs: Mapping[str, Any]) -> None:
        """The trainer has logged; of a step that is over this completes the line."""
        if self._line is None or self._line["step"] != state.global_step:
            return
        self._line |= {name: logs[key] for name, key in TRAINER.items() if key in logs}
        if "loss" in logs:
            self.flush()

    def flush(self) -> None:
        """Write the line that waits for the trainer's numbers."""
        if self._line is not None:
            line, self._line = self._line, None
            self.lines.add(line)

    def callback(self) -> Any:
        """The same as transformers' callback."""
        from transformers import TrainerCallback

        monitor = self

        class Watched(TrainerCallback):
            """Passes the trainer's events on to the monitor."""

            def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
                monitor.begin(args, state, more["model"], more["processing_class"])

            def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
                monitor.step_end(state, control, more["model"], more["processing_class"])

            def on_log(
                self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any
            ) -> None:
                monitor.logged(state, logs or {})

            def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
                monitor.flush()
                if monitor.gold is not None:
                    monitor.gold.saved(state)

            def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
                monitor.flush()
                if monitor.gold is not None:
                    monitor.gold.end(state, more["model"], more["processing_class"])

        return Watched()


def open_monitor(
    settings: MonitorSettings,
    folder: str | Path,
    rows: Sequence[GradedInstruction],
    *,
    reward: RubricReward | None = None,
    grader: Grader | None = None,
    spec: RewardSpec | None = None,
    gold_grader: Grader | None = None,
    judged_by: str = "",
) -> Monitor:
    """The monitor of a training, attached to its reward; its `callback()` goes to the trainer.

    Args:
        settings: see there.
        folder: for its files; the run's own.
        rows: what the policy is trained on; held-out prompts and criteria are none of these.
        reward: the reward; its grader is the training judge.
        grader, spec: training judge and reward of a training that asks no reward, such as DPO.
        gold_grader: the gold judge, in place of opening the one that the settings name.
        judged_by: how the training judge is named (checkpoint:FOLDER, …), if it is.

    Raises:
        GoldError: a gold judge that cannot be used, or that is the training judge itself.
        HeldOutError: no prompt is held out.
        RecordError: held-out rows that cannot be read.
    """
    soft_s1 = False
    if reward is not None:
        grader, spec = reward.grader, reward.spec
        soft_s1 = reward.oracle.specification.soft_s1
    spec = RewardSpec() if spec is None else spec
    gold = None
    if settings.gold is not None:
        chosen = settings.gold
        if grader is None:
            raise GoldError("gold: found no training judge to set beside it, expected grader=")
        if judged_by and _target(chosen.judge) == _target(judged_by):
            raise GoldError(
                f"gold.judge: found {chosen.judge!r}, which is the training judge itself; expected "
                "another one, which is not pleased by the same mistakes"
            )
        gold = GoldWatch(
            chosen,
            held_out(read_held_out(chosen.rows), rows, prompts=chosen.prompts, seed=chosen.seed),
            training=judge_with(
                grader, "reward" if reward is None else reward.operating_point, soft_s1=soft_s1
            ),
            gold=judge_of(chosen.judge, Path(folder), budget_usd=chosen.budget_usd)
            if gold_grader is None
            else judge_with(gold_grader),
            spec=spec,
            folder=folder,
        )
    monitor = Monitor(
        folder,
        rubrics={} if reward is None else reward.rubrics,
        spec=spec,
        soft_s1=soft_s1,
        gold=gold,
        for_alarms=True,
    )
    if reward is not None:
        reward.observers.append(monitor.observe)
    return monitor


def _target(judge: str) -> tuple[str, str]:
    """Kind and place of a judge, its options left away."""
    kind, _, rest = judge.partition(":")
    target = rest.split(",")[0].rstrip("/")
    return kind, str(Path(target).resolve()) if kind == "checkpoint" else target


def _mean(values: Iterable[float | bool | None]) -> float | None:
    known = [float(v) for v in values if v is not None]
    return math.fsum(known) / len(known) if known else None
