"""`promedical policy generate`: answers of a policy to a file of prompts, kept as they come.

The policy is a checkpoint, in this process through transformers, or a model behind any
OpenAI-compatible endpoint. Prompts of like length are answered together; which ones depends on the
file alone, and sampling is seeded for every such batch, so a run that was killed and goes on writes
the answers that it would have written. An answer that could not be had is a failure with its reason
and is asked for again on the next start; it is never an empty answer.

    OUT             {"id", "text", "tokens", "cut"} a line, or {"id", "failure"}, in prompts' order
    OUT.run.json    what the answers are of: policy, prompts, settings
    OUT.sqlite      replies of an endpoint

All three hold or may hold text and are for their owner alone (mode 0600). Left to others: decoding
(`generate`), calls (`promedical.llm`), grading.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from promedical.bench.kept import Kept, write_json
from promedical.records import GradedInstruction, RecordError, fingerprint, from_dict, read_dataset

__all__ = ["GenerateError", "GenerateSettings", "answer_file", "main", "read_prompts"]

DESCRIPTION = """\
Answer every prompt of a file with a policy: a checkpoint (a folder or a Hub id), or with
--endpoint MODEL@URL a model behind an OpenAI-compatible server. A prompt is a line of JSON:
  {"id": "q1", "messages": [{"role": "user", "content": "May I take both?"}]}
or {"id": "q1", "prompt": "May I take both?"}; rows of this project and folders of them will do.
Killed and started again, the same command goes on.
"""
# How fast it goes, not what is answered.
_NOT_ANSWERED = ("prompts", "out", "concurrency", "api_key_env", "device", "endpoint")


class GenerateError(ValueError):
    """Prompts, a policy or an output that cannot be used; the message names file and field."""


@dataclass(frozen=True)
class GenerateSettings:
    """How prompts are answered.

    Args:
        prompts: a JSON lines file or a dataset folder.
        out: the file of answers.
        endpoint: MODEL@URL, such as qwen3-8b@http://127.0.0.1:8000/v1, in place of a checkpoint.
        max_new_tokens: longest answer, in tokens.
        temperature: 0 decodes greedily.
        seed: of sampling.
        batch_size: answers at a time, of a checkpoint.
        device: of a checkpoint: "cpu", "cuda", …; a GPU if there is one.
        system: system prompt for an endpoint's conversations that have none.
        api_key_env: environment variable with an endpoint's key.
        concurrency: calls to an endpoint at a time.
    """

    prompts: Path
    out: Path
    endpoint: str | None = None
    max_new_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0
    batch_size: int = 16
    device: str | None = None
    system: str | None = None
    api_key_env: str | None = None
    concurrency: int = 16

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size", "concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: found {getattr(self, name)!r}, expected at least 1")
        if not self.temperature >= 0:
            raise ValueError(f"temperature: found {self.temperature!r}, expected 0 or more")


def main(argv: Sequence[str]) -> int:
    """Run `promedical policy generate` with these flags."""
    from promedical.progress import Stages
    from promedical.recipe import load_recipe, recipe_parser

    parser = recipe_parser(
        GenerateSettings,
        prog="promedical policy generate",
        usage="%(prog)s CHECKPOINT|--endpoint MODEL@URL --prompts FILE --out FILE [flags]",
        description=DESCRIPTION,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", nargs="?", help="a folder or a Hub id")
    checkpoint = parser.parse_known_args(list(argv))[0].checkpoint
    settings = load_recipe(GenerateSettings, None, argv, parser=parser)
    with Stages(1).stage("Answers") as move:
        kept = answer_file(
            checkpoint, settings, progress=lambda done, total: move("prompts", done, total)
        )
    failures = [line["failure"] for line in kept if "failure" in line]
    print(f"{settings.out}: {len(kept) - len(failures)} answers, {len(failures)} failures")
    cut = sum(bool(line.get("cut")) for line in kept)
    if cut:
        print(f"{cut} answers were cut at {settings.max_new_tokens} tokens")
    for why in sorted(set(failures)):
        print(f"failed: {failures.count(why)} {why}; the same command asks again")
    return 0


def answer_file(
    checkpoint: str | Path | None,
    settings: GenerateSettings,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Answer all prompts of a file, or what an earlier attempt left.

    Args:
        checkpoint: a folder, a Hub id or "embedded"; None with `settings.endpoint`.
        progress: called with (prompts done, prompts in all).

    Returns:
        The lines of the file of answers, in the prompts' order.

    Raises:
        GenerateError: no policy or two of them, or the file holds other answers.
        RecordError: prompts that cannot be read.
        BenchError: a checkpoint or an endpoint that cannot be used.
    """
    if (checkpoint is None) == (settings.endpoint is None):
        raise GenerateError("policy: expected either a checkpoint or --endpoint MODEL@URL")
    rows = read_prompts(settings.prompts)
    policy = settings.endpoint or str(checkpoint)
    _claim(settings, policy, rows)
    kept = Kept(settings.out)
    done = {id for id, line in kept.lines.items() if "text" in line}
    if progress is not None:
        progress(len(done), len(rows))
    if len(done) < len(rows):
        answers = (
            _local(policy, settings, rows, done)
            if settings.endpoint is None
            else _endpoint(settings, [row for row in rows if row.id not in done])
        )
        for line in answers:
            kept.add(line)
            if progress is not None:
                progress(sum("text" in found for found in kept.lines.values()), len(rows))
    lines = [kept.lines[row.id] for row in rows]
    _rewrite(settings.out, lines)
    return lines


def read_prompts(path: str | Path) -> list[GradedInstruction]:
    """Rows out of a file of prompts or a dataset folder.

    Raises:
        RecordError: a line that is no prompt, or an id that repeats; file and line are named.
    """
    path = Path(path)
    if path.is_dir():
        return read_dataset(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise RecordError(f"{path}: not found, expected prompts in JSON lines") from None
    except UnicodeDecodeError as error:
        raise RecordError(f"{path}: not UTF-8 text ({error})") from None
    rows: dict[str, GradedInstruction] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = _prompt(json.loads(line))
        except RecordError as error:
            raise RecordError(f"{path}: line {number}: {error}") from None
        except (ValueError, RecursionError) as error:
            raise RecordError(f"{path}: line {number}: not JSON ({error})") from None
        if row.id in rows:
            raise RecordError(f"{path}: line {number}: id: {row.id!r} repeats")
        rows[row.id] = row
    if not rows:
        raise RecordError(f"{path}: found no prompt, expected one a line")
    return list(rows.values())


def _prompt(data: Any) -> GradedInstruction:
    if not isinstance(data, dict):
        raise RecordError(f"found {type(data).__name__}, expected an object")
    # What else a graded row holds is not read.
    kept = {k: v for k, v in data.items() if k not in ("responses", "rubric", "prompt")}
    if "prompt" in data:
        if "messages" in data:
            raise RecordError("prompt: expected none beside messages")
        kept["messages"] = [{"role": "user", "content": data["prompt"]}]
    return from_dict(kept)


def _claim(settings: GenerateSettings, policy: str, rows: Sequence[GradedInstruction]) -> None:
    """Make the file of answers this run's, or see that it is.

    Raises:
        GenerateError: it holds other answers.
    """
    told = {k: v for k, v in asdict(settings).items() if k not in _NOT_ANSWERED}
    if settings.endpoint is not None:
        del told["batch_size"]
    identity = {"policy": policy, "prompts": fingerprint(rows), "settings": told}
    path = settings.out.with_name(f"{settings.out.name}.run.json")
    if path.exists():
        held = json.loads(path.read_text(encoding="utf-8"))
        names = sorted(k for k in identity if held.get(k) != identity[k])
        if names:
            raise GenerateError(
                f"{settings.out}: holds answers of a run with other {', '.join(names)}; choose "
                "another --out, or remove it and its .run.json"
            )
        return
    if settings.out.exists():
        raise GenerateError(f"{settings.out}: exists, and no run wrote it; choose another --out")
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, identity)


def _local(
    policy: str,
    settings: GenerateSettings,
    rows: Sequence[GradedInstruction],
    done: set[str],
) -> Iterator[Mapping[str, Any]]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from promedical.policy.generate import answer_with, prompt_ids
    from promedical.policy.run_folder import quiet, resolve

    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with quiet():
        try:
            path = resolve(policy)
            tokenizer = AutoTokenizer.from_pretrained(path)
            model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        except (OSError, ValueError) as error:
            raise GenerateError(f"{policy}: cannot be loaded: {error}") from None
    if tokenizer.chat_template is None:
        raise GenerateError(f"{policy}: the tokenizer has no chat template, expected one")
    model = model.to(device).eval()
    limit = getattr(model.config, "max_position_embeddings", None)
    lengths = {row.id: len(prompt_ids(tokenizer, row)) for row in rows}
    fitting = []
    for row in rows:
        if limit is not None and lengths[row.id] + settings.max_new_tokens > limit:
            yield {"id": row.id, "failure": "the prompt is too long for the model"}
        else:
            fitting.append(row)
    # Longest first: the batch that needs most memory fails at once, not at the end.
    fitting.sort(key=lambda row: -lengths[row.id])
    for start in range(0, len(fitting), settings.batch_size):
        batch = fitting[start : start + settings.batch_size]
        if all(row.id in done for row in batch):
            continue
        # Of the seed and the prompts alone, so that a batch that was cut short comes out the same.
        drawn = hashlib.sha256(f"{settings.seed}:{[row.id for row in batch]}".encode()).digest()
        torch.manual_seed(int.from_bytes(drawn[:8], "big") >> 1)
        answers = answer_with(
            model,
            tokenizer,
            batch,
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
            temperature=settings.temperature,
        )
        for row, text, tokens, cut in zip(
            batch, answers.texts, answers.tokens, answers.cut, strict=True
        ):
            if row.id not in done:
                yield {"id": row.id, "text": text, "tokens": tokens, "cut": cut}


def _endpoint(
    settings: GenerateSettings, rows: Sequence[GradedInstruction]
) -> Iterator[Mapping[str, Any]]:
    from promedical.bench.policies import EndpointPolicy
    from promedical.bench.specs import Spec
    from promedical.llm.client import EndpointAsker

    options: dict[str, Any] = {
        "temperature": settings.temperature,
        "max_tokens": settings.max_new_tokens,
        "seed": settings.seed,
        "concurrency": settings.concurrency,
    }
    for name in ("system", "api_key_env"):
        if getattr(settings, name) is not None:
            options[name] = getattr(settings, name)
    assert settings.endpoint is not None
    asker = EndpointAsker(settings.out.with_name(f"{settings.out.name}.sqlite"), progress=False)
    try:
        yield from EndpointPolicy(Spec("endpoint", settings.endpoint, options), asker).answer(rows)
    finally:
        asker.close()


def _rewrite(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Put the finished file in the prompts' order."""
    partial = path.with_name(f".{path.name}")
    partial.unlink(missing_ok=True)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    with open(
        partial, "x", encoding="utf-8", errors="replace", opener=lambda p, f: os.open(p, f, 0o600)
    ) as file:
        file.write(text)
    partial.replace(path)
