"""What a run in another engine (verl, OpenRLHF) is made of, whichever engine it is.

An exported run is one folder that may be moved as a whole, to a file system that every node sees:

    train, validation        prompts and ids, in the engine's own shape
    rubrics.jsonl            conversation and rubric by id, for the reward alone
    reward.yaml              the reward specification (`specification`)
    promedical_reward.py     what the engine loads
    run.sh                   the command, with every setting that matters said
    export.json              the recipe, counts, and what was left out and why

Files with text have mode 0600. The paper's settings are the defaults: Qwen3-8B, GRPO with G = 8,
β_KL = 0.04, learning rate 1e-6. PPO, its baseline, draws as many answers a step.

Left to others: each engine's rows and settings (`export_verl`, `export_openrlhf`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from promedical.corpus.export_formats import LeftOut, instruction_record
from promedical.policy.specification import RewardSpecification
from promedical.records import GradedInstruction, fingerprint, read_dataset, read_jsonl
from promedical.rubric import Tier

__all__ = [
    "EngineRecipe",
    "ExportError",
    "Prompts",
    "export_main",
    "read_prompts",
    "read_sides",
    "script",
    "write_private",
    "write_run",
]

RUBRICS = "rubrics.jsonl"
SPECIFICATION = "reward.yaml"
REWARD_FILE = "promedical_reward.py"
COMMAND = "run.sh"
REPORT = "export.json"


class ExportError(ValueError):
    """A run that cannot be written; the message says what was found and what is expected."""


@dataclass(frozen=True)
class EngineRecipe:
    """A policy's training in another engine.

    Paths of data are dataset folders or JSON lines files.

    Args:
        model: the policy to start from, as the engine finds it: a folder or a Hub id.
        data: instructions with rubrics to train on.
        validation: instructions to validate on; none if not given.
        out: folder of the run.
        algorithm: grpo, or ppo with a critic.
        reward: the reward; its rubrics are those of the data.
        nodes, gpus_per_node: the machines.
        num_generations: answers an instruction and step; with GRPO the group's size G (paper: 8).
        prompts_per_step: instructions a step.
        beta: coefficient of the KL penalty to the starting policy (paper: 0.04).
        learning_rate: of the policy (paper: 1e-6).
        critic_learning_rate: of PPO's critic.
        max_prompt_length: longest prompt, in tokens; longer ones are left out and counted.
        max_completion_length: longest answer, in tokens.
        temperature: of sampling.
        epochs: passes over the data.
        steps: where to stop; after the epochs if not given.
        save_steps: steps between checkpoints, which a stopped run goes on from.
        seed: of the order of the data.
        lora_rank, lora_alpha: of an adapter; rank 0 trains all weights.
        tensor_parallel: GPUs that one generating engine spans.
        gpu_memory_utilization: share of a GPU's memory for generating.
        tokens_per_gpu: tokens that one GPU computes gradients of at once.
        settings: more of the engine's own settings, by their names there; they win.

    Raises:
        ExportError: a setting out of range, or settings that do not fit each other.
    """

    model: str = "Qwen/Qwen3-8B"
    data: str = "data/train"
    validation: str | None = None
    out: str = "runs/policy-export"
    algorithm: Literal["grpo", "ppo"] = "grpo"
    reward: RewardSpecification = field(default_factory=RewardSpecification)
    nodes: int = 1
    gpus_per_node: int = 8
    num_generations: int = 8
    prompts_per_step: int = 128
    beta: float = 0.04
    learning_rate: float = 1e-6
    critic_learning_rate: float = 1e-5
    max_prompt_length: int = 2048
    max_completion_length: int = 2048
    temperature: float = 1.0
    epochs: int = 1
    steps: int | None = None
    save_steps: int = 20
    seed: int = 0
    lora_rank: int = 0
    lora_alpha: int = 32
    tensor_parallel: int = 1
    gpu_memory_utilization: float = 0.5
    tokens_per_gpu: int = 16384
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        whole = ("nodes", "gpus_per_node", "num_generations", "prompts_per_step", "epochs")
        lengths = ("max_prompt_length", "max_completion_length", "save_steps", "tensor_parallel")
        for name in (*whole, *lengths, "tokens_per_gpu", "lora_alpha"):
            if getattr(self, name) < 1:
                raise ExportError(f"{name}: found {getattr(self, name)!r}, expected 1 or more")
        for name in ("learning_rate", "critic_learning_rate", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ExportError(f"{name}: found {getattr(self, name)!r}, expected more than 0")
        for name in ("beta", "lora_rank"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ExportError(f"{name}: found {getattr(self, name)!r}, expected 0 or more")
        if self.steps is not None and self.steps < 1:
            raise ExportError(f"steps: found {self.steps!r}, expected 1 or more, or null")
        if not 0 < self.gpu_memory_utilization < 1:
            raise ExportError(
                f"gpu_memory_utilization: found {self.gpu_memory_utilization!r}, expected a share"
            )
        if self.algorithm == "grpo" and self.num_generations < 2:
            raise ExportError(
                f"num_generations: found {self.num_generations!r} with grpo, whose advantage is "
                "relative to its group; expected 2 or more"
            )
        answers, gpus = self.prompts_per_step * self.num_generations, self.gpus
        if answers % gpus:
            raise ExportError(
                f"prompts_per_step × num_generations: found {answers}, expected a multiple of the "
                f"{gpus} GPUs"
            )
        if gpus % self.tensor_parallel:
            raise ExportError(
                f"tensor_parallel: found {self.tensor_parallel}, expected a divisor of {gpus} GPUs"
            )
        longest = self.max_prompt_length + self.max_completion_length
        if self.tokens_per_gpu < longest:
            raise ExportError(
                f"tokens_per_gpu: found {self.tokens_per_gpu}, expected room for the longest "
                f"prompt and answer, {longest}"
            )
        if self.reward.rubrics != RewardSpecification().rubrics:
            raise ExportError(
                f"reward.rubrics: found {self.reward.rubrics!r}, but a run's rubrics are those of "
                "its data; leave it out"
            )

    @property
    def gpus(self) -> int:
        """GPUs in all."""
        return self.nodes * self.gpus_per_node

    @property
    def policy(self) -> str:
        """The model as it is found from wherever the run is started."""
        return str(Path(self.model).resolve()) if Path(self.model).is_dir() else self.model


@dataclass(frozen=True)
class Prompts:
    """Instructions of one side of a run.

    Args:
        rows: those that are trained or validated on.
        left_out: why others are not → how many.
        measured: whether the prompts' lengths are known: the tokenizer is on this machine.
    """

    rows: tuple[GradedInstruction, ...]
    left_out: Mapping[str, int]
    measured: bool


def read_prompts(path: str | Path, recipe: EngineRecipe) -> Prompts:
    """The instructions of a dataset that the run can use.

    Raises:
        RecordError: the dataset cannot be read.
        ExportError: none is left, or `on_failure: worst` and a rubric without a veto.
    """
    read = read_dataset(path) if Path(path).is_dir() else read_jsonl(path)
    lengths = _prompt_lengths(recipe.model, read)
    rows, left_out = [], Counter[str]()
    for number, row in enumerate(read):
        reason = _left_out(row)
        if reason is None and lengths is not None and lengths[number] > recipe.max_prompt_length:
            reason = "prompt_too_long"
        if reason is not None:
            left_out[reason] += 1
            continue
        assert row.rubric is not None
        if recipe.reward.on_failure == "worst" and not row.rubric.tier(Tier.VETO):
            raise ExportError(
                f"reward.on_failure: found 'worst', but instruction {row.id!r} has no veto, so "
                "its worst would be an honest answer's 0; expected 'stop'"
            )
        rows.append(row)
    if not rows:
        raise ExportError(f"{path}: no instruction is left ({dict(left_out)}), expected some")
    return Prompts(tuple(rows), dict(left_out), lengths is not None)


def read_sides(recipe: EngineRecipe) -> dict[str, Prompts]:
    """The instructions to train on and, if the recipe names any, to validate on.

    Raises:
        RecordError, ExportError: see `read_prompts`.
    """
    sides = {"train": read_prompts(recipe.data, recipe)}
    if recipe.validation is not None:
        sides["validation"] = read_prompts(recipe.validation, recipe)
    if len(sides["train"].rows) < recipe.prompts_per_step:
        raise ExportError(
            f"prompts_per_step: found {recipe.prompts_per_step}, but {recipe.data} has "
            f"{len(sides['train'].rows)} instructions; an engine drops what fills no step"
        )
    return sides


def _left_out(row: GradedInstruction) -> str | None:
    record = instruction_record(row)
    if isinstance(record, LeftOut):
        return record.reason
    assert row.rubric is not None
    return "safety_only" if row.rubric.safety_only else None


def _prompt_lengths(model: str, rows: Sequence[GradedInstruction]) -> list[int] | None:
    """Tokens of every prompt, or None if the policy's tokenizer is not on this machine."""
    if not Path(model).is_dir():
        return None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    lengths = []
    for row in rows:
        messages = [{"role": m.role, "content": m.content} for m in row.messages]
        rendered: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, enable_thinking=False, return_dict=True
        )
        lengths.append(len(rendered["input_ids"]))
    return lengths


def write_run(
    recipe: EngineRecipe,
    engine: str,
    sides: Mapping[str, Prompts],
    *,
    reward_file: str,
    command: str,
) -> Path:
    """Write what every engine's run has; its rows are written before, by the engine's module.

    Args:
        engine: its name and version, for the report.
        sides: "train" and, if there is one, "validation".
        reward_file: Python that the engine loads.
        command: a shell script.

    Returns:
        The folder.

    Raises:
        ExportError: two sides share an instruction's id but not its content.
    """
    folder = Path(recipe.out)
    folder.mkdir(parents=True, exist_ok=True)
    by_id: dict[str, GradedInstruction] = {}
    for prompts in sides.values():
        for row in prompts.rows:
            bare = row.with_responses(())
            if by_id.setdefault(row.id, bare) != bare:
                raise ExportError(f"instruction {row.id!r}: train and validation differ about it")
    records = (instruction_record(row) for row in by_id.values())
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    write_private(folder / RUBRICS, "".join(lines))
    write_private(folder / SPECIFICATION, specification_text(recipe.reward))
    (folder / REWARD_FILE).write_text(reward_file, encoding="utf-8")
    (folder / COMMAND).write_text(command, encoding="utf-8")
    (folder / COMMAND).chmod(0o755)
    report = {
        "engine": engine,
        "recipe": dataclasses.asdict(recipe),
        "sides": {
            name: {
                "instructions": len(prompts.rows),
                "left_out": dict(prompts.left_out),
                "prompt_lengths_measured": prompts.measured,
                "fingerprint": fingerprint(prompts.rows),
            }
            for name, prompts in sides.items()
        },
    }
    (folder / REPORT).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return folder


def specification_text(reward: RewardSpecification) -> str:
    """The reward of a run as YAML: rubrics beside it, folders as they are found from anywhere."""
    import yaml

    spec = reward.parsed()
    target = spec.target
    options = dict(spec.options)
    # The file is read from wherever a worker was started.
    if spec.kind == "checkpoint" and Path(target).is_dir():
        target = str(Path(target).resolve())
    for name in ("model", "token_file"):
        if name in options and Path(options[name]).exists():
            options[name] = str(Path(options[name]).resolve())
    grader = ",".join([f"{spec.kind}:{target}", *(f"{k}={v}" for k, v in options.items())])
    values = dataclasses.asdict(reward) | {"grader": grader, "rubrics": RUBRICS}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def write_private(path: Path, text: str) -> None:
    """Write a text that only its owner may read, from its first byte on."""
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_text(text, encoding="utf-8")


def export_main(
    argv: Sequence[str],
    verb: str,
    description: str,
    export: Callable[[EngineRecipe], Mapping[str, Prompts]],
) -> int:
    """Read a recipe and flags, export, and say what was written."""
    from promedical.recipe import load_recipe, recipe_parser

    parser = recipe_parser(
        EngineRecipe,
        prog=f"promedical policy {verb}",
        usage="%(prog)s RECIPE [flags]",
        description=description,
    )
    parser.add_argument("file", metavar="RECIPE", nargs="?", help="YAML file, as --recipe")
    path = parser.parse_known_args(list(argv))[0].file
    recipe = load_recipe(EngineRecipe, path, argv, parser=parser)
    for name, prompts in export(recipe).items():
        left_out = ", ".join(f"{count} {reason}" for reason, count in prompts.left_out.items())
        print(f"{name}: {len(prompts.rows)} instructions, left out: {left_out or 'none'}")
        if not prompts.measured:
            print(f"  {recipe.model} is no folder here, so no prompt's length was measured")
    print(f"start with: {Path(recipe.out) / COMMAND}")
    return 0


def script(lines: Sequence[str], command: str, arguments: Sequence[Sequence[str]]) -> str:
    """A shell script that runs a command from anywhere.

    Args:
        lines: comments and settings before the command.
        arguments: those of a line, as the shell is to pass them; $HERE is the script's folder.
    """
    head = [
        "#!/usr/bin/env bash",
        *lines,
        "set -euo pipefail",
        'HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"',
    ]
    rows = (" ".join(quoted(argument) for argument in row) for row in arguments)
    body = " \\\n  ".join([command, *rows, '"$@"'])
    return "\n".join(head) + "\n" + body + "\n"


def quoted(argument: str) -> str:
    """An argument for the shell, in which $HERE and nothing else is replaced."""
    if "$HERE" not in argument:
        return shlex.quote(argument)
    before, _, after = argument.partition("$HERE")
    return (
        (shlex.quote(before) if before else "") + '"$HERE"' + (shlex.quote(after) if after else "")
    )
