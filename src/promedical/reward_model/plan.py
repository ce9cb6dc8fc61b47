"""`promedical rm plan`: what a training run takes, before anything is trained (section 7.1).

Counts the recipe's own data as the trainer would pack it (`run.training_instances`,
`loss.pack_training_trees`), does the arithmetic of `scale`, and divides by a rate. A rate is never
assumed: it is measured here, by one training step on one of the recipe's rows, or taken from a
result that says where it was measured (`--rate`). Without either the plan has operations and no
hours.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from promedical import provenance
from promedical.reward_model.balance_rows import visible_pairs
from promedical.reward_model.recipe import RewardModelRecipe
from promedical.reward_model.scale import (
    Memory,
    ModelShape,
    Operations,
    Work,
    memory,
    operations,
)

if TYPE_CHECKING:
    from promedical.reward_model.instances import TrainingTree
    from promedical.reward_model.loss import TrainingRow

__all__ = ["Plan", "PlanError", "Rate", "main", "make_plan", "model_shape", "read_rate"]

DESCRIPTION = """\
Say what a recipe's training takes, before anything is trained: unique tokens, tokens without
packing, floating-point operations, memory and hours. The rate is measured on this machine by one
training step, or taken from a result with --rate.
"""
MATRIX = {"cuda": (8192, "bfloat16"), "cpu": (2048, "float32")}
ENOUGH = 0.75  # share of the time in which devices have a row, below which the plan warns


class PlanError(ValueError):
    """A model, a rate or data that cannot be planned with."""


@dataclass(frozen=True)
class Rate:
    """Floating-point operations a second while training, and where that was found.

    Args:
        flops_per_second: operations of `scale.operations` over seconds.
        says: for people: which row, which machine, or which result.
        tokens_per_second: of the same step; None if not measured here.
        matrix_flops_per_second: of a plain matrix product on the same machine, the upper bound.
        matrix: its size and type.
    """

    flops_per_second: float
    says: str
    tokens_per_second: float | None = None
    matrix_flops_per_second: float | None = None
    matrix: str | None = None


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    Args:
        model: its shape.
        counts: instructions, trees, rows, pairs and verdicts of an epoch.
        epochs: passes over the data.
        unique_tokens: an epoch, every token once.
        separate_tokens: an epoch, every (response, criterion) a sequence of its own.
        pair_tokens: an epoch, every pair two sequences, as TRL reads them.
        longest_row: tokens.
        operations: of the whole run.
        frozen_layers_once: whether the frozen layers are counted once, not once an epoch, because
            what they compute is kept.
        memory: on one of `devices`, weights, gradients and Adam sharded over them.
        devices: how many.
        rows_a_step: over all devices; a device reads one at a time.
        rate: of one device; None if none could be had, with the reason in `no_rate`.
        no_rate: why.
    """

    model: ModelShape
    counts: dict[str, int]
    epochs: float
    unique_tokens: int
    separate_tokens: int
    pair_tokens: int
    longest_row: int
    operations: Operations
    frozen_layers_once: bool
    memory: Memory
    devices: int = 1
    rows_a_step: int = 1
    rate: Rate | None = None
    no_rate: str | None = None

    @property
    def busy(self) -> float:
        """Share of the devices' time in which they have a row, were all rows alike."""
        return self.rows_a_step / (math.ceil(self.rows_a_step / self.devices) * self.devices)

    @property
    def device_hours(self) -> float | None:
        """Hours of one device; None without a rate."""
        if self.rate is None:
            return None
        return self.operations.total / self.rate.flops_per_second / 3600


def main(argv: Sequence[str]) -> int:
    """Run `promedical rm plan` with these flags."""
    from promedical.recipe import load_recipe, recipe_parser

    started = time.perf_counter()
    parser = recipe_parser(
        RewardModelRecipe,
        prog="promedical rm plan",
        usage="%(prog)s RECIPE [--rate R] [--devices N] [--save FILE] [flags]",
        description=DESCRIPTION,
    )
    parser.add_argument("file", metavar="RECIPE", nargs="?", help="YAML file, as --recipe")
    parser.add_argument(
        "--rate", help="operations a second of one device: a number, a result that holds one, none"
    )
    parser.add_argument("--devices", type=int, default=1, help="that share the work")
    parser.add_argument("--save", metavar="FILE", help="write the plan as JSON")
    given = parser.parse_known_args(list(argv))[0]
    recipe = load_recipe(RewardModelRecipe, given.file, argv, parser=parser)
    if given.devices < 1:
        raise PlanError(f"--devices: found {given.devices}, expected at least 1")
    rate = None if given.rate in (None, "none") else read_rate(given.rate)
    plan = make_plan(recipe, rate=rate, devices=given.devices, measure=given.rate is None)
    print("\n".join(lines(plan)))
    if given.save:
        where = provenance.provenance(
            seed=recipe.seed, recipe=asdict(recipe), started=started, command=None
        )
        text = json.dumps(asdict(plan) | {"provenance": where}, indent=1, ensure_ascii=False)
        Path(given.save).write_text(text + "\n", encoding="utf-8")
    return 0


def make_plan(
    recipe: RewardModelRecipe,
    *,
    rate: Rate | None = None,
    devices: int = 1,
    measure: bool = True,
) -> Plan:
    """Count a recipe's data, do the arithmetic, and measure a rate if none is given.

    Args:
        rate: of one device, if it is known.
        devices: over which weights, gradients and Adam are sharded.
        measure: whether to measure a rate where none is given.

    Raises:
        PlanError: a model that cannot be loaded, or nothing to train on.
        RecordError: data that cannot be read.
    """
    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from promedical.demo.models import resolve_model
    from promedical.reward_model.loss import pack_training_trees
    from promedical.reward_model.run import read_rows, training_instances
    from promedical.reward_model.trainer import rows_a_step

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows = read_rows(recipe.data)
    path = resolve_model(recipe.model)
    shape = model_shape(path)
    settings = recipe.train
    if settings.frozen_layers > shape.layers:
        raise PlanError(
            f"train.frozen_layers: found {settings.frozen_layers}, but {recipe.model} has "
            f"{shape.layers} layers"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise PlanError(f"model {recipe.model!r}: its tokenizer: {error}") from None
    instances = training_instances(rows, recipe, tokenizer)
    packed, _ = pack_training_trees(instances.trees, settings.max_tokens, **settings.loss_terms())
    if not packed:
        raise PlanError(f"{recipe.data}: found no loss term, expected pairs or known labels")
    work = Work(sum(len(r.row) for r in packed), sum(visible_pairs(r.row) for r in packed))
    # `run` keeps what frozen layers compute where epochs repeat on a CPU.
    once = bool(settings.frozen_layers and settings.epochs > 1 and not torch.cuda.is_available())
    longest = max(len(r.row) for r in packed)
    plan = Plan(
        model=shape,
        counts={
            "instructions": len(rows),
            "trees": len(instances.trees),
            "rows": len(packed),
            "pairs": sum(len(unit.pairs) for tree in instances.trees for unit in tree.units),
            "verdicts": sum(len(unit.points) for tree in instances.trees for unit in tree.units),
        },
        epochs=settings.epochs,
        unique_tokens=int(work.tokens),
        separate_tokens=sum(sum(_paths(tree)) for tree in instances.trees),
        pair_tokens=sum(map(_pair_tokens, instances.trees)),
        longest_row=longest,
        operations=_run_operations(shape, work, recipe, once),
        frozen_layers_once=once,
        memory=_memory(shape, longest, recipe, devices),
        devices=devices,
        rows_a_step=rows_a_step(settings, packed),
        rate=rate,
        no_rate=None if rate else "none was asked for",
    )
    if rate is not None or not measure:
        return plan
    needed, held = _memory(shape, longest, recipe, 1).total, _machine_memory()
    if needed > held:
        why = f"a step takes about {needed / 1e9:.1f} GB and this machine has {held / 1e9:.1f} GB"
        return replace(plan, no_rate=f"not measured: {why}; give --rate")
    return replace(plan, rate=measured_rate(path, recipe, packed, shape), no_rate=None)


def model_shape(path: str | Path) -> ModelShape:
    """The shape of a checkpoint's classifier, from its configuration alone; no weight is read.

    Raises:
        PlanError: there is no configuration of a causal model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    try:
        config = AutoConfig.from_pretrained(path)
        config.num_labels = 1
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
        layers = model.base_model.layers
    except (OSError, ValueError, AttributeError) as error:
        raise PlanError(f"model {path}: cannot be planned with: {error}") from None
    a_layer = sum(p.numel() for p in layers.parameters()) // len(layers)
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    return ModelShape(
        name=Path(path).name,
        layers=len(layers),
        layer_parameters=a_layer,
        other_parameters=sum(p.numel() for p in model.parameters()) - a_layer * len(layers),
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        width=heads * head,
        kv_width=(getattr(config, "num_key_value_heads", None) or heads) * head,
    )


def _memory(shape: ModelShape, row_tokens: int, recipe: RewardModelRecipe, shards: int) -> Memory:
    settings = recipe.train
    return memory(
        shape,
        row_tokens,
        dtype=settings.dtype,
        lora_rank=settings.lora_rank,
        frozen_layers=settings.frozen_layers,
        gradient_checkpointing=settings.gradient_checkpointing,
        shards=shards,
    )


def _run_operations(
    shape: ModelShape, work: Work, recipe: RewardModelRecipe, frozen_once: bool
) -> Operations:
    """Of all epochs; the frozen layers' part only once if it is kept."""
    settings = recipe.train
    frozen = settings.frozen_layers
    an_epoch = operations(shape, work, lora=bool(settings.lora_rank), frozen_layers=frozen)
    below = replace(shape, layers=frozen)
    kept = operations(below, work, frozen_layers=frozen)
    again = settings.epochs - 1 if frozen_once else 0
    return Operations(
        settings.epochs * an_epoch.weights - again * kept.weights,
        settings.epochs * an_epoch.attention - again * kept.attention,
    )


def _paths(tree: TrainingTree) -> list[int]:
    """Tokens of every leaf's sequence."""
    prompt, answers = len(tree.tree.prompt), tree.tree.responses
    return [prompt + len(answers[f.response]) + len(f.tokens) for f in tree.tree.leaves]


def _pair_tokens(tree: TrainingTree) -> int:
    tokens = _paths(tree)
    return sum(tokens[i] for unit in tree.units for pair in unit.pairs for i in pair)


def _machine_memory() -> float:
    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


# --- rates ----------------------------------------------------------------------------------------


def read_rate(given: str) -> Rate:
    """A rate given as a number of operations a second, or by a result that holds one.

    A result is a JSON file with its provenance and `rate: {flops_per_second, says}`, such as
    `promedical rm plan --save` writes where a rate was measured.

    Raises:
        PlanError: it is neither.
    """
    try:
        number = float(given)
    except ValueError:
        return _rate_of(Path(given))
    if not (number > 0 and math.isfinite(number)):
        raise PlanError(f"--rate: found {given}, expected operations a second above 0")
    return Rate(number, "given as a number")


def _rate_of(path: Path) -> Rate:
    expected = "expected a number, or a result with rate.flops_per_second"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        found = float(result["rate"]["flops_per_second"])
    except OSError as error:
        raise PlanError(f"--rate: {path}: {error.strerror}, {expected}") from None
    except (ValueError, KeyError, TypeError):
        raise PlanError(f"--rate: {path}: holds no rate, {expected}") from None
    faults = provenance.check(result)
    if faults:
        raise PlanError(f"--rate: {path}: says not where it was measured: {faults[0]}")
    machine = result["provenance"]["machine"]
    where = machine["gpu"] or machine["cpu"]
    return Rate(found, f"{path.name}: {result['rate'].get('says', 'a rate')}, on {where}")


def measured_rate(
    path: str | Path, recipe: RewardModelRecipe, rows: Sequence[TrainingRow], shape: ModelShape
) -> Rate:
    """One forward and backward pass over the recipe's row of middle length, on this machine.

    The weights are loaded; no optimiser step is made. The second pass is timed.
    """
    import torch

    from promedical.reward_model.loss import rubric_loss
    from promedical.reward_model.model import new_reward_model

    settings = recipe.train
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model, _ = new_reward_model(path, settings, seed=recipe.seed)
    except (OSError, ValueError) as error:
        raise PlanError(f"model {recipe.model!r}: {error}") from None
    model.to(device).train()
    chosen = sorted(rows, key=lambda row: len(row.row))[len(rows) // 2]

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=settings.dtype != "float32"):
            scores = model.score(chosen.row)
            loss = rubric_loss(scores, chosen.terms) / max(1, chosen.terms.items)
        loss.backward()  # type: ignore[no-untyped-call]
        model.zero_grad(set_to_none=True)

    step()
    seconds = _timed(step, device)
    done = operations(
        shape,
        Work(len(chosen.row), visible_pairs(chosen.row)),
        lora=bool(settings.lora_rank),
        frozen_layers=settings.frozen_layers,
    )
    size, dtype = MATRIX[device]
    return Rate(
        done.total / seconds,
        f"measured here, a row of {len(chosen.row)} tokens",
        tokens_per_second=len(chosen.row) / seconds,
        matrix_flops_per_second=_matrix_rate(size, dtype, device),
        matrix=f"{size}³ {dtype}",
    )


def _matrix_rate(size: int, dtype: str, device: str) -> float:
    import torch

    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    _ = a @ b
    return 2 * size**3 / statistics.median(_timed(lambda: a @ b, device) for _ in range(3))


def _timed(work: Callable[[], object], device: str) -> float:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


# --- lines ----------------------------------------------------------------------------------------


def lines(plan: Plan) -> list[str]:
    """The plan for a person."""
    shape, counts, ops, held = plan.model, plan.counts, plan.operations, plan.memory
    once = ", the frozen layers' once" if plan.frozen_layers_once else ""
    found = [
        f"model       {shape.name}, {shape.parameters / 1e6:,.1f} M parameters, "
        f"{shape.layers} layers",
        f"data        {counts['instructions']:,} instructions, {counts['pairs']:,} pairs, "
        f"{counts['verdicts']:,} verdicts; {counts['trees']:,} trees in {counts['rows']:,} rows, "
        f"the longest {plan.longest_row:,} tokens",
        f"tokens      {plan.unique_tokens:,} an epoch, {plan.epochs:g} epochs",
        f"  separate  {plan.separate_tokens:,}, {plan.separate_tokens / plan.unique_tokens:.1f} "
        "times as many: every (answer, criterion) a sequence of its own",
        f"  in pairs  {plan.pair_tokens:,}, {plan.pair_tokens / plan.unique_tokens:.1f} times as "
        "many: every pair two sequences",
        f"operations  {ops.total:.3g} floating-point operations, all epochs{once}: "
        f"{ops.weights:.3g} weights, {ops.attention:.3g} attention",
        f"memory      {held.total / 1e9:.1f} GB on each of {plan.devices} device"
        f"{'s' if plan.devices > 1 else ''}: weights {held.weights / 1e9:.1f}, gradients "
        f"{held.gradients / 1e9:.1f}, Adam {held.adam / 1e9:.1f}, activations about "
        f"{held.activations / 1e9:.1f}",
    ]
    if plan.devices > 1:
        found.append(
            f"steps       {plan.rows_a_step:,} rows a step on {plan.devices} devices, which have "
            f"one {100 * plan.busy:.0f} % of the time"
        )
        if plan.busy < ENOUGH:
            found[-1] += "; raise train.batch_pairs or train.batch_trees, or take fewer devices"
    rate, hours = plan.rate, plan.device_hours
    if rate is None or hours is None:
        return [*found, f"rate        none: {plan.no_rate}", "hours       unknown without a rate"]
    found.append(f"rate        {rate.flops_per_second:.3g} operations a second, {rate.says}")
    if rate.matrix_flops_per_second is not None and rate.tokens_per_second is not None:
        share = rate.flops_per_second / rate.matrix_flops_per_second
        found.append(
            f"            {rate.tokens_per_second:,.0f} tokens a second, {100 * share:.0f} % of "
            f"the {rate.matrix} matrix rate, {rate.matrix_flops_per_second:.3g}"
        )
    shared = ""
    if plan.devices > 1:
        shared = f", {hours / plan.devices / plan.busy:.2f} on {plan.devices} if all rows are alike"
    return [*found, f"hours       {hours:.2f} of one device{shared}; without evaluation and saving"]
