"""Settings of controlled degradation (section 7.3); frozen before the first training run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["DegradeConfig", "DegradeError", "estimate_tokens"]


class DegradeError(ValueError):
    """Rows or settings that cannot be used; the message names the row or the setting."""


def estimate_tokens(text: str) -> int:
    """Tokens of a text where no tokenizer is at hand: 1.35 a word, and one a line break."""
    return math.ceil(1.35 * len(text.split())) + text.count("\n")


@dataclass(frozen=True)
class DegradeConfig:
    """Settings of the generator.

    Args:
        responses: responses an instruction, at least 4.
        max_tokens: the most tokens of one response.
        count_tokens: counts them; by default an estimate from words.
        candidates: constructions tried for an instruction, to balance length.
        edited_share: share of responses made from the physician's own text.
        manner_share: how often an instruction plays each manner criterion.
        near_miss_share: how often a left-out statement becomes a near miss.
        second_violation_share: how often a violating response gets a second violation.

    Raises:
        DegradeError: a setting out of its range.
    """

    responses: int = 4
    max_tokens: int = 120
    count_tokens: Callable[[str], int] = estimate_tokens
    candidates: int = 6
    edited_share: float = 0.35
    manner_share: float = 0.45
    near_miss_share: float = 0.5
    second_violation_share: float = 0.1

    def __post_init__(self) -> None:
        for name, least in (("responses", 4), ("max_tokens", 60), ("candidates", 1)):
            if getattr(self, name) < least:
                raise DegradeError(f"{name}: found {getattr(self, name)!r}, expected ≥ {least}")
        for name in (
            "edited_share",
            "manner_share",
            "near_miss_share",
            "second_violation_share",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise DegradeError(f"{name}: found {getattr(self, name)!r}, expected 0 to 1")
