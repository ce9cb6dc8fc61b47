"""Grading: responses and a rubric in, verdicts with probabilities and scores out.

All responses to one instruction and all their criteria are one tree, so every response is read
once, not once per criterion. A judgment that fails is the verdict "error" with its reason; it never
becomes met or unmet. Left to others: thresholds (`calibrate`), figures (`promedical.bench`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from promedical.records import GradedInstruction, Message, RecordError
from promedical.reward_model.calibrate import (
    Calibration,
    CalibrationError,
    CalibrationItem,
    OperatingPoint,
    calibrate,
)
from promedical.reward_model.instances import OVERALL
from promedical.reward_model.model import TreeRewardModel
from promedical.reward_model.render import TEMPLATE_VERSION, Renderer, ensure_pad, spoken
from promedical.reward_model.tree import Tree, pack
from promedical.reward_model.trunk import TrunkCache
from promedical.rubric import Rubric, Scores, Verdict, score

__all__ = ["CheckpointError", "Grade", "RawScores", "RubricRewardModel"]

METADATA = "promedical.json"
FORMAT = 1


class CheckpointError(ValueError):
    """A folder that is not a usable reward model; the message says what is missing."""


@dataclass(frozen=True)
class Grade:
    """What the model says of one response.

    Args:
        verdicts: criterion id → verdict at the operating point asked for.
        scores: S1, S2, S3 of these verdicts, and what is unresolved.
        probabilities: criterion id → calibrated probability that the sentence is true; NaN where
            the judgment failed.
        raw: criterion id → s, uncalibrated log-odds.
        failures: criterion id → why the judgment failed.
        emptied: whether the response was nothing but an unclosed thought, graded as empty.
    """

    verdicts: dict[str, Verdict]
    scores: Scores
    probabilities: dict[str, float]
    raw: dict[str, float]
    failures: dict[str, str]
    emptied: bool = False


@dataclass(frozen=True)
class RawScores:
    """Scores of many rows; a judgment that failed is NaN and its reason is in `failures`.

    Args:
        criteria: (instruction, response, criterion) → s.
        overall: (instruction, response) → s of the overall criterion.
        failures: key → why.
        tokens: unique tokens that were read.
        emptied: responses that were nothing but an unclosed thought, graded as empty.
    """

    criteria: dict[tuple[str, str, str], float]
    overall: dict[tuple[str, str], float]
    failures: dict[tuple[str, ...], str]
    tokens: int
    emptied: int = 0


class RubricRewardModel:
    """A trained reward model with its tokenizer and calibration.

    Args:
        model: the network.
        tokenizer: its tokenizer, with a chat template.
        calibration: raw scores → verdicts; without it p = σ(s) and thresholds of one half.
        max_tokens: longest packed row; larger trees are split.
        cache: hidden states of frozen layers shared with other models.
    """

    def __init__(
        self,
        model: TreeRewardModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        calibration: Calibration | None = None,
        max_tokens: int = 8192,
        cache: TrunkCache | None = None,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.renderer = Renderer(tokenizer)
        self.calibration = calibration or Calibration.uncalibrated()
        self.max_tokens = max_tokens
        # A path may not be longer than a row, nor than the positions the model knows.
        positions = getattr(model.model.config, "max_position_embeddings", None)
        self.max_path = min(max_tokens, positions or max_tokens)
        if cache is not None and not cache.same_trunk(model):
            raise ValueError("cache: its frozen layers are not this model's")
        self.cache = cache

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, device: str | None = None, max_tokens: int = 8192
    ) -> RubricRewardModel:
        """Load a checkpoint folder or Hub id.

        Raises:
            CheckpointError: this is no reward model, or its `promedical.json` is broken or of
                another template version. A checkpoint without that file loads uncalibrated.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                path, dtype=torch.float32, output_loading_info=True
            )
            metadata = cached_file(path, METADATA, _raise_exceptions_for_missing_entries=False)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be loaded: {error}") from None
        if model.config.num_labels != 1:
            raise CheckpointError(
                f"{path}: num_labels: found {model.config.num_labels}, expected 1 (a reward model)"
            )
        if loading["missing_keys"]:
            # transformers draws them at random, and random scores look like scores.
            raise CheckpointError(f"{path}: has no weights for {sorted(loading['missing_keys'])}")
        ensure_pad(tokenizer, model)
        if device is not None:
            model.to(device)
        calibration = None if metadata is None else _read_metadata(Path(metadata))
        return cls(
            TreeRewardModel(model), tokenizer, calibration=calibration, max_tokens=max_tokens
        )

    def save_metadata(self, path: str | Path, **extra: Any) -> None:
        """Write `promedical.json` beside a saved checkpoint.

        Args:
            extra: more to keep, such as the recipe and the data's fingerprint.
        """
        data = {
            "format": FORMAT,
            "template_version": TEMPLATE_VERSION,
            "score": "log-odds that the criterion's sentence is true, in every tier; "
            "for a veto, that it is violated",
            "calibration": self.calibration.to_json(),
        } | extra
        # Renamed into place, so that a reader never sees half of it.
        partial = Path(path) / f".{METADATA}"
        partial.write_text(json.dumps(data, indent=2, sort_keys=True))
        partial.replace(Path(path) / METADATA)

    def grade(
        self,
        messages: Sequence[Message],
        responses: Sequence[str],
        rubric: Rubric,
        *,
        operating_point: OperatingPoint = "audit",
    ) -> list[Grade]:
        """Judge every criterion of every response.

        Args:
            messages: the conversation; its last turn is the user's.
            responses: the answers, read together as one tree.
            rubric: the criteria.
            operating_point: "audit" (a person looks at "cannot say") or "reward" (for RL).

        Returns:
            A grade for each response, in order.
        """
        texts = [criterion.text for criterion in rubric.criteria]
        values, failures, _ = self._leaf_scores(messages, responses, texts)
        grades = []
        for r in range(len(responses)):
            verdicts, probabilities, raw, failed = {}, {}, {}, {}
            for k, criterion in enumerate(rubric.criteria):
                s = values[r][k]
                raw[criterion.id] = s
                if (r, k) in failures:
                    failed[criterion.id] = failures[r, k]
                    verdicts[criterion.id] = Verdict.ERROR
                    probabilities[criterion.id] = math.nan
                    continue
                verdicts[criterion.id], probabilities[criterion.id] = self.calibration.verdict(
                    criterion.tier, s, operating_point
                )
            grades.append(
                Grade(
                    verdicts,
                    score(rubric, verdicts),
                    probabilities,
                    raw,
                    failed,
                    emptied=spoken(responses[r])[1],
                )
            )
        return grades

    def score_rows(
        self,
        rows: Sequence[GradedInstruction],
        *,
        overall: bool = False,
        criteria: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> RawScores:
        """Raw scores of every (response, criterion) of many rows, and of the overall criterion.

        Args:
            overall, criteria: what to score.
            progress: called with (rows done, rows in all).

        Raises:
            RecordError: a row without a rubric.
        """
        found = RawScores({}, {}, {}, 0)
        tokens = 0
        for number, row in enumerate(rows, start=1):
            if row.rubric is None:
                raise RecordError(f"instruction {row.id!r}: rubric: missing, expected one")
            asked = list(row.rubric.criteria) if criteria else []
            texts = [c.text for c in asked] + ([OVERALL] if overall else [])
            values, failures, read = self._leaf_scores(
                row.messages, [r.text for r in row.responses], texts
            )
            tokens += read
            for r, response in enumerate(row.responses):
                for k, s in enumerate(values[r]):
                    if k < len(asked):
                        found.criteria[row.id, response.id, asked[k].id] = s
                        key: tuple[str, ...] = (row.id, response.id, asked[k].id)
                    else:
                        found.overall[row.id, response.id] = s
                        key = (row.id, response.id)
                    if (r, k) in failures:
                        found.failures[key] = failures[r, k]
            if progress is not None:
                progress(number, len(rows))
        emptied = sum(spoken(r.text)[1] for row in rows for r in row.responses)
        return RawScores(found.criteria, found.overall, found.failures, tokens, emptied)

    def calibrated_on(
        self, rows: Sequence[GradedInstruction], scores: RawScores, **settings: float
    ) -> RubricRewardModel:
        """This model with a calibration fitted on rows that were scored.

        Raises:
            CalibrationError: labels or settings that cannot be used.
        """
        items = [
            CalibrationItem(
                (row.id, response.id),
                criterion.tier,
                scores.criteria[row.id, response.id, criterion.id],
                response.verdicts.get(criterion.id, Verdict.ABSTAIN),
            )
            for row in rows
            if row.rubric is not None
            for response in row.responses
            for criterion in row.rubric.criteria
        ]
        return RubricRewardModel(
            self.model,
            self.tokenizer,
            calibration=calibrate(items, **settings),
            max_tokens=self.max_tokens,
            cache=self.cache,
        )

    def _leaf_scores(
        self, messages: Sequence[Message], responses: Sequence[str], texts: Sequence[str]
    ) -> tuple[list[list[float]], dict[tuple[int, int], str], int]:
        """s of every (response, text), why where there is none, and the tokens read."""
        asked = [(r, text) for r in range(len(responses)) for text in texts]
        values = [[math.nan] * len(texts) for _ in responses]
        failures: dict[tuple[int, int], str] = {}
        if not asked:
            return values, failures, 0
        tree = self.renderer.tree(messages, list(responses), asked)
        keep, tokens = [], 0
        for i, leaf in enumerate(tree.leaves):
            length = len(tree.prompt) + len(tree.responses[leaf.response]) + len(leaf.tokens)
            if length > self.max_path:
                failures[divmod(i, len(texts))] = (
                    f"{length} tokens, more than the {self.max_path} that fit"
                )
            else:
                keep.append(i)
        if keep:
            kept = Tree(tree.prompt, tree.responses, tuple(tree.leaves[i] for i in keep))
            for row in pack([kept], self.max_tokens):
                tokens += len(row)
                hidden = None if self.cache is None else self.cache.hidden(row)
                with torch.inference_mode():
                    scored = self.model.score(row, hidden).float().cpu().tolist()
                for packed, s in zip(row.leaves, scored, strict=True):
                    r, k = divmod(keep[packed.leaf], len(texts))
                    if math.isfinite(s):
                        values[r][k] = s
                    else:
                        failures[r, k] = f"the model's score is {s}"
        return values, failures, tokens


def _read_metadata(path: Path) -> Calibration:
    try:
        data = json.loads(path.read_text())
        version, fitted = data["template_version"], data["calibration"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error!r})") from None
    if version != TEMPLATE_VERSION:
        raise CheckpointError(
            f"{path}: template_version: found {version!r}, expected {TEMPLATE_VERSION!r}; "
            "scores of another template do not fit this calibration"
        )
    try:
        return Calibration.from_json(fitted)
    except CalibrationError as error:
        raise CheckpointError(f"{path}: calibration: {error}") from None
