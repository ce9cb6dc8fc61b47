"""Grading: responses and a rubric in, verdicts with probabilities and scores out.

All responses to one instruction and all their criteria are one tree (section 7.1), so every
response is read once, not once per criterion. Requests are taken from a stream window by window:
those with the same conversation grow one tree, equal answers and criteria are read once, and trees
share rows up to a budget of tokens. None of that changes a score. A judgment that fails is the
verdict "error" with its reason; it never becomes met or unmet, nor fails its neighbours. Left to
others: thresholds (`calibrate`), other places to score in (`backends`), figures
(`promedical.bench`).
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from promedical.records import GradedInstruction, Message, RecordError
from promedical.reward_model.attention import unsupported
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
from promedical.reward_model.tree import PackedRow, Tree, pack
from promedical.reward_model.trunk import TrunkCache
from promedical.reward_model.window import Answered, Asked, Window
from promedical.rubric import Criterion, Rubric, Scores, Verdict, score

__all__ = [
    "CheckpointError",
    "Grade",
    "GradeRequest",
    "GradeResult",
    "RawScores",
    "RubricRewardModel",
    "failed_grade",
    "read_calibration",
    "to_grade",
]

METADATA = "promedical.json"
FORMAT = 1
DTYPES = ("float32", "bfloat16")
# Rows' worth of tokens that are held at once: enough for rows to be filled well.
WINDOW_ROWS = 4
# A window also ends here, so that a stream of empty requests holds little.
WINDOW_REQUESTS = 1024


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
class GradeRequest:
    """Answers to one conversation, to be judged by one rubric.

    Args:
        messages: the conversation; its last turn is the user's.
        responses: the answers.
        rubric: the criteria.
        id: anything that says which request this is; the result carries it.
        operating_point: "audit" (a person looks at "cannot say") or "reward" (for RL).

    Raises:
        RecordError: no messages, a last turn that is not the user's, an answer that is not text,
            or an operating point that does not exist.
    """

    messages: Sequence[Message]
    responses: Sequence[str]
    rubric: Rubric
    id: str = ""
    operating_point: OperatingPoint = "audit"

    def __post_init__(self) -> None:
        object.__setattr__(self, "messages", tuple(self.messages))
        object.__setattr__(self, "responses", tuple(self.responses))
        where = f"request {self.id!r}: " if self.id else ""
        role = self.messages[-1].role if self.messages else "missing"
        if role != "user":
            raise RecordError(f"{where}messages: the last turn is {role!r}, expected 'user'")
        for number, text in enumerate(self.responses):
            if not isinstance(text, str):
                raise RecordError(
                    f"{where}responses[{number}]: found {type(text).__name__}, expected a string"
                )
        if self.operating_point not in get_args(OperatingPoint):
            raise RecordError(
                f"{where}operating_point: found {self.operating_point!r}, expected one of "
                f"{', '.join(get_args(OperatingPoint))}"
            )


@dataclass(frozen=True)
class GradeResult:
    """The grades of one request, one for each of its responses, in order."""

    id: str
    grades: tuple[Grade, ...]


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
        cls,
        path: str | Path,
        *,
        device: str | None = None,
        dtype: str = "float32",
        max_tokens: int = 8192,
        asks: str = "criteria",
    ) -> RubricRewardModel:
        """Load a checkpoint folder or Hub id.

        Args:
            device: where to score, such as "cuda"; the CPU if None.
            dtype: "float32", or "bfloat16": half the memory and several times the speed of a GPU,
                with scores that are rounded (`promedical rm doctor` says by how much).
            max_tokens: longest packed row.
            asks: what it has to have been trained to answer; only "criteria" gives verdicts.

        Raises:
            CheckpointError: this is no reward model, its `promedical.json` is broken, of another
                template version or of a model that `asks` otherwise, or `device` or `dtype` cannot
                be had. A checkpoint without that file loads uncalibrated.
        """
        _check_there(path)
        if dtype not in DTYPES:
            raise CheckpointError(f"dtype: found {dtype!r}, expected one of {', '.join(DTYPES)}")
        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                path, dtype=getattr(torch, dtype), output_loading_info=True
            )
        except Exception as error:  # transformers, tokenizers, safetensors: each has its own
            raise CheckpointError(f"{path}: cannot be loaded: {error}") from None
        if not hasattr(model.base_model, "layers"):
            raise CheckpointError(
                f"{path}: model_type: found {model.config.model_type!r}, expected a decoder that "
                "holds its blocks as `layers`, such as Llama's or Qwen's"
            )
        if model.config.num_labels != 1:
            raise CheckpointError(
                f"{path}: num_labels: found {model.config.num_labels}, expected 1 (a reward model)"
            )
        if loading["missing_keys"]:
            # transformers draws them at random, and random scores look like scores.
            raise CheckpointError(f"{path}: has no weights for {sorted(loading['missing_keys'])}")
        ensure_pad(tokenizer, model)
        calibration = read_calibration(path, asks=asks)
        if unsupported(model.config) is None:
            model.score.to(torch.float32)  # small, and in bfloat16 it would round s to 1 in 256
        if device is not None:
            try:
                model.to(device)
            except (AssertionError, RuntimeError) as error:  # as torch says that there is none
                raise CheckpointError(f"device: found {device!r}: {error}") from None
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
        request = GradeRequest(messages, responses, rubric, operating_point=operating_point)
        (result,) = self.grade_many([request])
        return list(result.grades)

    def grade_many(self, requests: Iterable[GradeRequest]) -> Iterator[GradeResult]:
        """Judge a stream of requests, one or a million, with memory for a window of them.

        Args:
            requests: read as far as the next window needs. Those of one window that share a
                conversation share a tree, so they are best kept together.

        Returns:
            The results, in the order of the requests, each as soon as it and all before it are
            known. Scores do not depend on what else is in the stream.
        """
        waiting: deque[GradeRequest] = deque()

        def asked() -> Iterator[Asked]:
            for request in requests:
                waiting.append(request)
                texts = [criterion.text for criterion in request.rubric.criteria]
                yield Asked(request.messages, request.responses, texts)

        for found, _ in self._answers(asked()):
            request = waiting.popleft()
            yield GradeResult(request.id, tuple(self._grades(request, found)))

    def _grades(self, request: GradeRequest, found: Answered) -> Iterator[Grade]:
        criteria = request.rubric.criteria
        for r, response in enumerate(request.responses):
            yield to_grade(
                request.rubric,
                self.calibration,
                {c.id: found.values[r][k] for k, c in enumerate(criteria)},
                {
                    c.id: found.failures[r, k]
                    for k, c in enumerate(criteria)
                    if (r, k) in found.failures
                },
                operating_point=request.operating_point,
                emptied=spoken(response)[1],
            )

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
        about: list[list[Criterion]] = []
        for row in rows:
            if row.rubric is None:
                raise RecordError(f"instruction {row.id!r}: rubric: missing, expected one")
            about.append(list(row.rubric.criteria) if criteria else [])
        last = [OVERALL] if overall else []
        asked = (
            Asked(row.messages, [r.text for r in row.responses], [c.text for c in own] + last)
            for row, own in zip(rows, about, strict=True)
        )
        for number, (answered, read) in enumerate(self._answers(asked)):
            row, own = rows[number], about[number]
            tokens += read
            for r, response in enumerate(row.responses):
                for k, s in enumerate(answered.values[r]):
                    key: tuple[str, ...] = (row.id, response.id)
                    if k < len(own):
                        key = (row.id, response.id, own[k].id)
                        found.criteria[row.id, response.id, own[k].id] = s
                    else:
                        found.overall[row.id, response.id] = s
                    if (r, k) in answered.failures:
                        found.failures[key] = answered.failures[r, k]
            if progress is not None:
                progress(number + 1, len(rows))
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

    def _answers(self, asked: Iterable[Asked]) -> Iterator[tuple[Answered, int]]:
        """What was found for each, in order, and the tokens that were read for it since the last.

        With a cache every row is the tree of one request: what is cached is looked up a row at a
        time, and a neighbour that is not there would have the whole row computed again.
        """
        window = Window(self.renderer, self.max_tokens, self.max_path, self.cache is None)
        for one in asked:
            window.add(one)
            full = window.tokens >= WINDOW_ROWS * self.max_tokens
            if full or len(window.answered) >= WINDOW_REQUESTS:
                yield from self._scored(window)
                window = Window(self.renderer, self.max_tokens, self.max_path, self.cache is None)
        yield from self._scored(window)

    def _scored(self, window: Window) -> Iterator[tuple[Answered, int]]:
        done = read = 0

        def ready() -> Iterator[tuple[Answered, int]]:
            nonlocal done, read
            while done < len(window.answered) and not window.answered[done].open:
                done += 1
                tokens, read = read, 0
                yield window.answered[done - 1], tokens

        trees, places = window.trees()
        everything = [range(len(tree.leaves)) for tree in trees]
        for row, scores in self._row_scores(trees, everything):
            read += len(row)
            for leaf, s in zip(row.leaves, scores, strict=True):
                for request, r, k in places[leaf.tree][leaf.leaf]:
                    window.answered[request].put(r, k, s)
            yield from ready()
        yield from ready()

    def _row_scores(
        self, trees: Sequence[Tree], leaves: Sequence[Iterable[int]]
    ) -> Iterator[tuple[PackedRow, list[float | str]]]:
        """Rows of these leaves of the trees, with s of every leaf or why there is none.

        A row that fails is halved until what is at fault is alone, so it takes nobody with it, and
        what only asked for too much memory at once gets its score.
        """
        for row in _packed(trees, leaves, self.max_tokens, share=self.cache is None):
            try:
                yield row, self._score(row)
                continue
            except (RuntimeError, IndexError) as error:  # memory, devices, ids: as torch has them
                reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            # Outside of the except block, whose traceback keeps the failed row's memory.
            if len(row.leaves) == 1:
                yield row, [f"the model failed: {reason}"]
                continue
            half = len(row.leaves) // 2
            for part in (row.leaves[:half], row.leaves[half:]):
                chosen: list[list[int]] = [[] for _ in trees]
                for leaf in part:
                    chosen[leaf.tree].append(leaf.leaf)
                yield from self._row_scores(trees, chosen)

    def _score(self, row: PackedRow) -> list[float | str]:
        hidden = None if self.cache is None else self.cache.hidden(row)
        with torch.inference_mode():
            scored: list[float] = self.model.score(row, hidden).float().cpu().tolist()
        return [s if math.isfinite(s) else f"the model's score is {s}" for s in scored]


def _packed(
    trees: Sequence[Tree], leaves: Sequence[Iterable[int]], max_tokens: int, *, share: bool
) -> Iterator[PackedRow]:
    """Rows that hold these leaves of the trees, several trees a row if they may share one."""
    return iter(pack(trees, max_tokens, points=leaves, share_rows=share))


def to_grade(
    rubric: Rubric,
    calibration: Calibration,
    raw: Mapping[str, float],
    failures: Mapping[str, str],
    *,
    operating_point: OperatingPoint,
    emptied: bool = False,
) -> Grade:
    """The grade that raw scores mean.

    Args:
        raw: criterion id → s, NaN where the judgment failed.
        failures: criterion id → why it failed.
    """
    verdicts, probabilities = {}, {}
    for criterion in rubric.criteria:
        verdicts[criterion.id], probabilities[criterion.id] = Verdict.ERROR, math.nan
        if criterion.id not in failures:
            verdicts[criterion.id], probabilities[criterion.id] = calibration.verdict(
                criterion.tier, raw[criterion.id], operating_point
            )
    return Grade(
        verdicts, score(rubric, verdicts), probabilities, dict(raw), dict(failures), emptied
    )


def failed_grade(rubric: Rubric, reason: str, *, emptied: bool = False) -> Grade:
    """The grade of a response of which no judgment could be had."""
    ids = [criterion.id for criterion in rubric.criteria]
    return to_grade(
        rubric,
        Calibration.uncalibrated(),
        dict.fromkeys(ids, math.nan),
        dict.fromkeys(ids, reason),
        operating_point="audit",
        emptied=emptied,
    )


def _check_there(path: str | Path) -> None:
    """A Hub id has one slash at most; anything longer is a folder, and is there or is a mistake."""
    if len(Path(path).parts) > 2 and not Path(path).is_dir():
        raise CheckpointError(
            f"{path}: cannot be loaded: no such folder, expected a reward model's (promedical "
            "quickstart makes runs/quickstart/models/explicit) or a Hub id"
        )


def read_calibration(path: str | Path, *, asks: str = "criteria") -> Calibration | None:
    """The calibration beside a checkpoint; None if there is no `promedical.json`.

    Raises:
        CheckpointError: the file is broken, of another template version, or of a model that was
            trained to answer another question.
    """
    _check_there(path)
    try:
        metadata = cached_file(path, METADATA, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be loaded: {error}") from None
    return None if metadata is None else _read_metadata(Path(metadata), asks)


def _read_metadata(path: Path, asks: str) -> Calibration:
    try:
        data = json.loads(path.read_text())
        version, fitted = data["template_version"], data["calibration"]
        trained = data.get("asks", "criteria")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error!r})") from None
    if trained != asks:
        raise CheckpointError(
            f"{path}: asks: found {trained!r}, expected {asks!r}; a scalar baseline "
            '("overall" or "rubric") gives no verdicts on criteria'
        )
    if version != TEMPLATE_VERSION:
        raise CheckpointError(
            f"{path}: template_version: found {version!r}, expected {TEMPLATE_VERSION!r}; "
            "scores of another template do not fit this calibration"
        )
    try:
        return Calibration.from_json(fitted)
    except CalibrationError as error:
        raise CheckpointError(f"{path}: calibration: {error}") from None
