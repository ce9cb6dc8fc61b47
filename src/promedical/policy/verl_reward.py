"""The reward for verl (0.9): `compute_score`, and a stop where verl itself would train on.

verl calls `compute_score` for one answer at a time, in several worker processes and threads. A row
carries its instruction's id; conversation and rubric are looked up by it in the specification's
file, which every worker opens once. The number is `Oracle.settle`'s, so that a failed grading is
never 0.

What verl 0.9's trainer does with an exception from here: it logs it, marks the prompt's group as
failed, and trains on what is left of the batch, for as long as anything is left. `StopOnFailure` is
the replay buffer with which such a group ends the run instead; started again, it goes on from the
last checkpoint (`trainer.resume_mode: auto`). `promedical policy export-verl` writes both into the
run's configuration.

Nothing here imports verl until verl asks for `StopOnFailure`. Left to others: the number
(`specification`), the run's files (`export_verl`).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from promedical.policy.specification import (
    GradingStoppedError,
    Oracle,
    SpecificationError,
    open_oracle,
    read_specification,
)

__all__ = ["StopOnFailure", "compute_score", "oracle_of"]  # noqa: F822  # see __getattr__

_opened: dict[str, Oracle] = {}
_opening = threading.Lock()


def oracle_of(specification: str) -> Oracle:
    """The oracle of a specification's file, opened once a process.

    Raises:
        ValueError: it cannot be used; the message says what to change.
    """
    with _opening:
        if specification not in _opened:
            _opened[specification] = open_oracle(read_specification(specification))
        return _opened[specification]


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: Mapping[str, Any] | None = None,
    *,
    specification: str,
    **_: Any,
) -> dict[str, float]:
    """The reward of one answer, for verl's `reward.custom_reward_function`.

    Args:
        data_source, ground_truth: verl's; the second is the instruction's id as well.
        solution_str: the answer's text.
        extra_info: of the row; `instruction_id` says which rubric.
        specification: path of the specification's YAML file, from `reward_kwargs`.

    Returns:
        `score`, which is the reward, and for verl's metrics S1, S2, S3, `violated` and
        `grading_failed`.

    Raises:
        GradingStoppedError: the answer could not be graded.
        SpecificationError: the row names no instruction of the specification.
    """
    instruction_id = (extra_info or {}).get("instruction_id")
    if not isinstance(instruction_id, str):
        raise SpecificationError(
            f"extra_info.instruction_id: found {type(instruction_id).__name__}, expected text"
        )
    (outcome,) = oracle_of(specification).settle(instruction_id, [solution_str])
    assert outcome.reward is not None
    return {"score": outcome.reward, **outcome.metrics()}


def __getattr__(name: str) -> Any:
    if name == "StopOnFailure":
        return _stop_on_failure()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _stop_on_failure() -> type[Any]:
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

    class StopOnFailure(ReplayBuffer):  # type: ignore[misc]
        """verl's replay buffer, which raises as soon as a prompt's group has failed."""

        def _sync_metadata_from_transfer_queue(self) -> None:
            super()._sync_metadata_from_transfer_queue()
            failed = sum(len(keys) for keys in self.failure_keys.values())
            if failed:
                raise GradingStoppedError(
                    f"{failed} prompts failed; the worker's log says which and why. The run "
                    "stops and, started again, goes on from its last checkpoint"
                )

    return StopOnFailure
