"""Where scores come from: this process, our server, or vLLM, behind one small interface.

A backend grades as `RubricRewardModel` does, which is the local one. `HttpBackend` asks the server
of `promedical rm serve` (`POST /v1/grade`); `VllmBackend` asks `vllm serve CHECKPOINT --runner
pooling` (`POST /classify`), renders and calibrates here, and sends token ids, never text, so that
no template but ours can touch them. All give the same `Grade` objects.

A call that fails is the verdict "error" with the reason, never a verdict: it is tried again where
that can help, a full queue is waited for, and a refused call is halved until what is at fault is
alone. Left to others: what scores mean (`grade`, `calibrate`), the server (`serve`), and whether
the backends agree on this machine (`doctor`).
"""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from transformers import AutoTokenizer

from promedical.records import Message
from promedical.reward_model.calibrate import Calibration, OperatingPoint
from promedical.reward_model.grade import (
    CheckpointError,
    Grade,
    GradeRequest,
    GradeResult,
    failed_grade,
    read_calibration,
    to_grade,
)
from promedical.reward_model.render import Renderer, RenderError, spoken
from promedical.reward_model.serve import is_token
from promedical.reward_model.tree import paths
from promedical.rubric import Rubric, Verdict, score

if TYPE_CHECKING:
    import httpx

__all__ = ["Backend", "BackendError", "HttpBackend", "VllmBackend"]

# A reply is asked for again after these: the server is busy, starting or was cut off.
TRANSIENT = (408, 429, 500, 502, 503, 504)
# About what was asked, so that less of it may be answered: other errors are about the server.
REFUSED = (400, 413, 422)
SHOWN = 200

T = TypeVar("T")
Item = TypeVar("Item")


class BackendError(ValueError):
    """A backend that cannot be used as it was asked for; the message says what to change."""


@runtime_checkable
class Backend(Protocol):
    """What grades: `RubricRewardModel`, `HttpBackend`, `VllmBackend`."""

    def grade(
        self,
        messages: Sequence[Message],
        responses: Sequence[str],
        rubric: Rubric,
        *,
        operating_point: OperatingPoint = "audit",
    ) -> list[Grade]:
        """Judge every criterion of every response; a grade for each response, in order."""

    def grade_many(self, requests: Iterable[GradeRequest]) -> Iterator[GradeResult]:
        """Judge a stream of requests, with bounded memory; the results in its order."""


class _CallError(Exception):
    """A call that gave no reply; `refused` if the server will never answer this request."""

    def __init__(self, reason: str, *, refused: bool = False) -> None:
        super().__init__(reason)
        self.refused = refused


class _Remote:
    """A server's address, how often it is asked again, and how many calls are under way.

    Args:
        url: where the server is, such as "http://127.0.0.1:8000".
        token: bearer token.
        concurrency: requests under way at once in `grade_many`.
        attempts: calls for one reply, a full queue not counted.
        patience_s: how long one reply may be waited for, over all attempts.
        timeout_s: of one call.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        concurrency: int = 8,
        attempts: int = 5,
        patience_s: float = 600.0,
        timeout_s: float = 120.0,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise BackendError(
                f"url: found {url!r}, expected one that starts with http:// or https://"
            )
        for name, value in (("concurrency", concurrency), ("attempts", attempts)):
            if value < 1:
                raise BackendError(f"{name}: found {value}, expected at least 1")
        try:
            import httpx
        except ImportError:
            raise BackendError("httpx is missing: pip install 'promedical[serve]'") from None
        if token is not None and not is_token(token):  # not shown: it would be in a log then
            raise BackendError("token: expected one word of ASCII characters")
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self.concurrency, self.attempts, self.patience_s = concurrency, attempts, patience_s
        limits = httpx.Limits(max_connections=concurrency)
        try:
            self._client = httpx.Client(
                base_url=url.rstrip("/"), headers=headers, timeout=timeout_s, limits=limits
            )
        except httpx.InvalidURL as error:
            raise BackendError(f"url: found {url!r}: {error}") from None

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the connections back."""
        self._client.close()

    def grade(
        self,
        messages: Sequence[Message],
        responses: Sequence[str],
        rubric: Rubric,
        *,
        operating_point: OperatingPoint = "audit",
    ) -> list[Grade]:
        """Judge every criterion of every response, as `RubricRewardModel.grade`."""
        request = GradeRequest(messages, responses, rubric, operating_point=operating_point)
        return self._graded(request)

    def grade_many(self, requests: Iterable[GradeRequest]) -> Iterator[GradeResult]:
        """Judge a stream, some requests at once; the results in its order."""

        def work(request: GradeRequest) -> GradeResult:
            return GradeResult(request.id, tuple(self._graded(request)))

        return _in_order(work, requests, self.concurrency)

    def _graded(self, request: GradeRequest) -> list[Grade]:
        raise NotImplementedError

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The reply's JSON.

        Raises:
            _CallError: there is none, after every attempt that could help.
        """
        import httpx

        until = time.monotonic() + self.patience_s
        failed = 0
        while True:
            wait: float | None = None
            try:
                reply = self._client.post(path, json=body)
            except (httpx.RequestError, UnicodeError) as error:
                reason = f"{type(error).__name__}: {error}"[:SHOWN]
                if isinstance(error, UnicodeError):
                    raise _CallError(f"not valid Unicode ({reason})", refused=True) from None
            else:
                if reply.status_code == 200:
                    try:
                        return reply.json()
                    except ValueError:
                        raise _CallError("the reply is not JSON") from None
                reason = f"HTTP {reply.status_code}{_said(reply)}"
                if reply.status_code not in TRANSIENT:
                    raise _CallError(reason, refused=reply.status_code in REFUSED)
                wait = _retry_after(reply.headers.get("Retry-After"))
            # A server that says when it will have room has not failed.
            failed += wait is None
            if wait is None:
                wait = 0.5 * 2 ** (failed - 1) * random.uniform(0.5, 1)
            if failed >= self.attempts:
                raise _CallError(f"{reason} (asked {failed} times)")
            if time.monotonic() + wait > until:
                raise _CallError(f"{reason} (waited for {self.patience_s:.0f} s)")
            time.sleep(wait)


class HttpBackend(_Remote):
    """The server of `promedical rm serve`.

    Args:
        judgments: responses × criteria of one call at most; a larger request is several calls.
        **remote: url, token, concurrency, attempts, patience_s, timeout_s, as in the server's
            address: `HttpBackend("http://127.0.0.1:8000", token="…")`.

    Raises:
        BackendError: an argument that cannot be used, or httpx is missing.
    """

    def __init__(self, url: str, *, judgments: int = 1024, **remote: Any) -> None:
        super().__init__(url, **remote)
        self.judgments = judgments

    def _graded(self, request: GradeRequest) -> list[Grade]:
        criteria = request.rubric.criteria
        if not criteria:
            return [_of_empty_rubric(request, text) for text in request.responses]
        size = max(1, self.judgments // len(criteria))
        grades: list[Grade] = []
        for start in range(0, len(request.responses), size):
            grades += self._call(request, request.responses[start : start + size])
        return grades

    def _call(self, request: GradeRequest, responses: Sequence[str]) -> list[Grade]:
        body = {
            "messages": [{"role": m.role, "content": m.content} for m in request.messages],
            "responses": list(responses),
            "rubric": _rubric_json(request.rubric),
            "operating_point": request.operating_point,
        }

        def call(chosen: Sequence[int]) -> list[Grade]:
            reply = self._post("/v1/grade", body | {"responses": [responses[i] for i in chosen]})
            grades = reply.get("grades") if isinstance(reply, dict) else None
            if not isinstance(grades, list) or len(grades) != len(chosen):
                found = len(grades) if isinstance(grades, list) else "no list of"
                raise _CallError(f"the reply has {found} grades, expected {len(chosen)}")
            return [_grade_from(entry, request.rubric) for entry in grades]

        found = _halved(call, range(len(responses)))
        return [
            failed_grade(request.rubric, entry, emptied=spoken(text)[1])
            if isinstance(entry, str)
            else entry
            for entry, text in zip(found, responses, strict=True)
        ]


class VllmBackend(_Remote):
    """A checkpoint behind `vllm serve CHECKPOINT --runner pooling`.

    Args:
        checkpoint: the same checkpoint here: its tokenizer renders, its `promedical.json`
            calibrates; the weights are not loaded.
        model: the name under which vLLM serves it; `checkpoint` if None.
        inputs: sequences of one call at most. They stay in order, so that the criteria of one
            response follow each other and vLLM's prefix cache has their common part.
        **remote: as in `HttpBackend`.

    Raises:
        BackendError: an argument that cannot be used, or httpx is missing.
        CheckpointError: the tokenizer or `promedical.json` cannot be used.
    """

    def __init__(
        self,
        url: str,
        checkpoint: str | Path,
        *,
        model: str | None = None,
        inputs: int = 64,
        **remote: Any,
    ) -> None:
        super().__init__(url, **remote)
        try:
            self.renderer = Renderer(AutoTokenizer.from_pretrained(checkpoint))
        except Exception as error:  # transformers and tokenizers each have their own
            raise CheckpointError(f"{checkpoint}: cannot be loaded: {error}") from None
        self.calibration = read_calibration(checkpoint) or Calibration.uncalibrated()
        self.model = str(checkpoint) if model is None else model
        self.inputs = inputs

    def _graded(self, request: GradeRequest) -> list[Grade]:
        texts = [criterion.text for criterion in request.rubric.criteria]
        grades = []
        for response in request.responses:
            found = self._scores(request.messages, response, texts)
            ids = [criterion.id for criterion in request.rubric.criteria]
            by_id = dict(zip(ids, found, strict=True))
            grades.append(
                to_grade(
                    request.rubric,
                    self.calibration,
                    {i: math.nan if isinstance(s, str) else s for i, s in by_id.items()},
                    {i: s for i, s in by_id.items() if isinstance(s, str)},
                    operating_point=request.operating_point,
                    emptied=spoken(response)[1],
                )
            )
        return grades

    def _scores(
        self, messages: Sequence[Message], response: str, texts: Sequence[str]
    ) -> list[float | str]:
        """s of every sentence about one response, or why there is none."""

        def call(chosen: Sequence[int]) -> list[float | str]:
            try:
                tree = self.renderer.tree(messages, [response], [(0, texts[k]) for k in chosen])
            except (RenderError, TypeError, UnicodeError) as error:
                reason = f"cannot be rendered: {type(error).__name__}: {error}"
                raise _CallError(reason, refused=True) from None
            ids = [list(path) for path in paths(tree)]
            body = {"model": self.model, "input": ids, "use_activation": False}
            return _classified(self._post("/classify", body), len(ids))

        found: list[float | str] = []
        for start in range(0, len(texts), self.inputs):
            found += _halved(call, range(start, min(start + self.inputs, len(texts))))
        return found


def _halved(call: Callable[[Sequence[int]], list[Item]], chosen: Sequence[int]) -> list[Item | str]:
    """What a call gives for each, or why it failed; a refused call is tried again in halves."""
    try:
        return list(call(chosen))
    except _CallError as error:
        if not error.refused or len(chosen) == 1:
            return [str(error)] * len(chosen)
    half = len(chosen) // 2
    return _halved(call, chosen[:half]) + _halved(call, chosen[half:])


def _in_order(work: Callable[[Item], T], items: Iterable[Item], at_once: int) -> Iterator[T]:
    """The results in the order of the items, so many under way and held at once."""
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(at_once, thread_name_prefix="promedical-backend") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                # Twice as many as are under way: a slow one in front does not idle the others.
                if len(waiting) >= 2 * at_once:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _classified(reply: Any, count: int) -> list[float | str]:
    """vLLM's reply as s of every input, or what is wrong with it.

    Raises:
        _CallError: it is no such reply.
    """
    data = reply.get("data") if isinstance(reply, dict) else None
    if not isinstance(data, list) or len(data) != count:
        found = len(data) if isinstance(data, list) else "no list of"
        raise _CallError(f"the reply has {found} scores, expected {count}")
    scores: dict[int, float | str] = {}
    for place, entry in enumerate(data):
        at = entry.get("index", place) if isinstance(entry, dict) else place
        if at in scores or at not in range(count):
            raise _CallError(f"the reply's inputs are not 0 … {count - 1}, each once")
        probs = entry.get("probs") if isinstance(entry, dict) else None
        one = probs[0] if isinstance(probs, list) and len(probs) == 1 else None
        s = _number(one)
        scores[at] = s if math.isfinite(s) else f"the reply's score is {str(probs)[:SHOWN]}"
    return [scores[i] for i in range(count)]


def _grade_from(entry: Any, rubric: Rubric) -> Grade:
    """A grade of the server's reply; what is missing or makes no sense is an error, said why.

    S1, S2 and S3 are added up here from the verdicts, by the definition everything else uses.
    """
    parts = {
        name: entry.get(name) if isinstance(entry, dict) else None
        for name in ("verdicts", "probabilities", "raw", "failures")
    }
    given = {name: part if isinstance(part, dict) else {} for name, part in parts.items()}
    verdicts, probabilities, raw, failures = {}, {}, {}, {}
    for criterion in rubric.criteria:
        i = criterion.id
        s, p = _number(given["raw"].get(i)), _number(given["probabilities"].get(i))
        found = given["verdicts"].get(i)
        try:
            verdict = Verdict(str(found))
        except ValueError:
            verdict, why = Verdict.ERROR, "the reply has no verdict for it"
        else:
            why = str(given["failures"].get(i, "the server gave no reason"))[:SHOWN]
            if verdict is not Verdict.ERROR and not (math.isfinite(s) and 0 <= p <= 1):
                verdict, why = Verdict.ERROR, f"the reply says {found}, with no score for it"
        if verdict is Verdict.ERROR:
            s = p = math.nan
            failures[i] = why
        verdicts[i], probabilities[i], raw[i] = verdict, p, s
    emptied = isinstance(entry, dict) and entry.get("emptied") is True
    return Grade(verdicts, score(rubric, verdicts), probabilities, raw, failures, emptied)


def _of_empty_rubric(request: GradeRequest, text: str) -> Grade:
    return failed_grade(request.rubric, "", emptied=spoken(text)[1])


def _number(value: Any) -> float:
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if known else math.nan


def _rubric_json(rubric: Rubric) -> dict[str, Any]:
    return {
        "safety_only": rubric.safety_only,
        "criteria": [
            {
                "id": c.id,
                "tier": c.tier.value,
                "text": c.text,
                "weight": c.weight,
                "axis": c.axis,
                "kind": None if c.kind is None else c.kind.value,
            }
            for c in rubric.criteria
        ],
    }


def _said(reply: httpx.Response) -> str:
    """What an error's body says, shortened; ours and vLLM's have it under "error"."""
    try:
        body = reply.json()
    except ValueError:
        return ""
    error = body.get("error", body) if isinstance(body, dict) else None
    message = error.get("message", error.get("detail")) if isinstance(error, dict) else error
    return "" if message is None else f": {str(message)[:SHOWN]}"


def _retry_after(value: str | None) -> float | None:
    """Seconds to wait, of a header that holds seconds or a date; None if it holds neither."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            then = parsedate_to_datetime(value)
        except ValueError:
            return None
        if then.tzinfo is None:  # as of a date in "-0000"
            then = then.replace(tzinfo=UTC)
        seconds = (then - datetime.now(UTC)).total_seconds()
    # Not at once in any case: that would be no waiting.
    return max(0.05, seconds) if math.isfinite(seconds) else None
