"""The reward for OpenRLHF (0.11): `reward_func(queries, prompts, labels)`.

OpenRLHF loads a file and calls its `reward_func` for one answer at a time; `label` is the
instruction's id, and `query` is prompt and answer as one text with all special tokens, from which
the answer is cut out. The number is `Oracle.settle`'s, so that a failed grading is never 0.

What OpenRLHF 0.11 does with an exception from here: it logs its message, goes on without a reward,
and fails some steps later over a missing tensor. A failure therefore leaves as `RunStopped`, which
is no `Exception`, so that nothing on the way can hold it back; started again with
`--ckpt.load_enable`, the run goes on from its last checkpoint.

Left to others: the number (`specification`), the run's files (`export_openrlhf`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from promedical.policy.specification import GradingStoppedError, Oracle, SpecificationError
from promedical.policy.verl_reward import oracle_of

__all__ = ["RunStopped", "answer_of", "reward_func"]


class RunStopped(BaseException):  # like KeyboardInterrupt: it ends the run
    """The run cannot go on; the message names an id and a kind of failure, never a text."""


def reward_func(specification: str, tokenizer: str) -> Callable[..., dict[str, Any]]:
    """OpenRLHF's reward function for a specification.

    Args:
        specification: path of the specification's YAML file.
        tokenizer: the policy's folder or Hub id: it says which tokens are no part of an answer.

    Returns:
        A function of queries, prompts and labels that gives `rewards`, `scores` and `extra_logs`,
        tensors with one number an answer.
    """
    loaded: list[Any] = []

    def graded(
        queries: Sequence[str], prompts: Sequence[str], labels: Sequence[str], **_: Any
    ) -> dict[str, Any]:
        try:
            if not loaded:
                loaded.append(_tokenizer(tokenizer))
            return _rewards(oracle_of(specification), loaded[0], queries, prompts, labels)
        except (GradingStoppedError, ValueError) as error:
            raise RunStopped(str(error)) from None

    return graded


def _tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def _rewards(
    oracle: Oracle,
    tokenizer: Any,
    queries: Sequence[str],
    prompts: Sequence[str],
    labels: Sequence[str],
) -> dict[str, Any]:
    import torch

    texts = [
        answer_of(query, prompt, tokenizer, label)
        for query, prompt, label in zip(queries, prompts, labels, strict=True)
    ]
    groups: dict[str, list[int]] = {}
    for i, label in enumerate(labels):
        groups.setdefault(label, []).append(i)
    rewards = [0.0] * len(texts)
    logs: dict[str, list[float]] = {}
    for label, members in groups.items():
        settled = oracle.settle(label, [texts[i] for i in members])
        for i, outcome in zip(members, settled, strict=True):
            assert outcome.reward is not None
            rewards[i] = outcome.reward
            for name, value in outcome.metrics().items():
                logs.setdefault(name, [0.0] * len(texts))[i] = value
    found = torch.tensor(rewards)
    return {
        "rewards": found,
        "scores": found.clone(),
        "extra_logs": {name: torch.tensor(values) for name, values in logs.items()},
    }


def answer_of(query: str, prompt: str, tokenizer: Any, label: str = "") -> str:
    """The answer at the end of a query, without special tokens, as the other engines decode it.

    Args:
        query: prompt and answer, decoded with special tokens.
        prompt: as it was given to the model.
        tokenizer: the policy's: which texts are special tokens, and how a prompt decodes.
        label: names the row in an error.

    Raises:
        SpecificationError: the query does not begin with the prompt: it was cut to fit.
    """
    if not query.startswith(prompt):
        # Not every tokenizer gives a text back as it was, and the query has been through it.
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        prompt = tokenizer.decode(ids, skip_special_tokens=False)
    if not query.startswith(prompt):
        raise SpecificationError(
            f"instruction {label!r}: the query of {len(query)} characters does not begin with its "
            f"prompt of {len(prompt)}, expected data.max_len to have room for the whole prompt"
        )
    answer = query[len(prompt) :]
    special = {str(tokenizer.convert_ids_to_tokens(i)) for i in tokenizer.all_special_ids}
    for token in sorted(special, key=len, reverse=True):
        answer = answer.replace(token, "")
    return answer
