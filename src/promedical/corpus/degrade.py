"""Controlled degradation: responses whose labels follow from how they were made (section 7.3).

From a physician's answer and its statements come several responses an instruction, in two styles:
*assembled* from statements, and *edited* from the physician's own sentences. Statements are left
out and replaced, or changed into near misses; violations and manner elements come from the phrase
banks, each with its twin in another response. Every criterion gets a label, abstain where the
construction does not decide it.

The steps, each in the module of its name: `dissect` takes rows apart, `plan` deals the phrases,
`construct` writes, `labels` labels; each instruction is built several times and `balance` picks one
of them, so that length says nothing about S1 or S3. Left to others: pairs and the overall
preference.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from promedical.corpus.balance import Lengths, balance, lengths
from promedical.corpus.construct import construct
from promedical.corpus.degrade_config import DegradeConfig, DegradeError
from promedical.corpus.dissect import is_statement, statements_of, take_apart
from promedical.corpus.phrases import Split, load_bank
from promedical.corpus.plan import Decks, plan_responses
from promedical.records import GradedInstruction, Response
from promedical.rubric import Verdict

__all__ = ["DegradeConfig", "DegradeError", "DegradeResult", "degrade"]


@dataclass(frozen=True)
class DegradeResult:
    """Rows with constructed responses, and what became of everything.

    Args:
        rows: the input rows in order, with responses; rows that could not be used have none.
        counts: how many rows, responses, labels by tier and value, discordant pairs by tier,
            construction steps; and the correlations of length with S1 and S3.
    """

    rows: tuple[GradedInstruction, ...]
    counts: dict[str, float]


def _count(
    rows: Sequence[GradedInstruction], used: Sequence[int], count: Callable[[str], int]
) -> dict[str, float]:
    """What there is: rows, labels, discordant pairs, steps, correlations."""
    counts: Counter[str] = Counter()
    total = Lengths()
    for number in used:
        row = rows[number]
        assert row.rubric is not None
        total = total.plus(lengths(row, row.responses, count))
        for criterion in row.rubric.criteria:
            values = [r.verdicts[criterion.id] for r in row.responses]
            for value in values:
                counts[f"labels.{criterion.tier.value}.{value.value}"] += 1
            met, unmet = values.count(Verdict.MET), values.count(Verdict.UNMET)
            counts[f"pairs.{criterion.tier.value}"] += met * unmet
            counts[f"criteria.{criterion.tier.value}"] += 1
            counts[f"criteria.{criterion.tier.value}.discordant"] += bool(met * unmet)
            if criterion.kind is not None or not is_statement(criterion):
                name = criterion.kind.value if criterion.kind else criterion.id
                counts[f"pairs.{name}"] += met * unmet
                counts[f"labels.{name}.met"] += met
                counts[f"labels.{name}.unmet"] += unmet
        for response in row.responses:
            counts["tokens"] += count(response.text)
            for step in response.construction:
                head = step.split(":")
                name = ".".join(head[:2]) if head[0] in ("style", "form", "violation") else head[0]
                counts[f"steps.{name}"] += 1
    result: dict[str, float] = {
        "instructions": len(rows),
        "instructions.used": len(used),
        "instructions.without_statements": len(rows) - len(used),
        "responses": sum(len(r.responses) for r in rows),
        **dict(sorted(counts.items())),
    }
    names = ("length_s1", "length_s3", "length_s1.within", "length_s3.within")
    for name, correlation in zip(names, total.correlations(), strict=True):
        result[f"correlation.{name}"] = round(correlation, 4)
    return result


def degrade(
    rows: Sequence[GradedInstruction],
    *,
    split: Split,
    seed: int,
    config: DegradeConfig | None = None,
) -> DegradeResult:
    """Build labelled responses for every instruction that has statements.

    Args:
        rows: instructions with rubric and reference; replacements come from the other rows, so pass
            one side of a split at a time.
        split: whose phrase families to use, "train", "calibration" or "bench".
        seed: the same rows, seed and settings give the same responses.
        config: settings.

    Raises:
        DegradeError: a setting out of range, ids that repeat, or phrases that do not fit.
    """
    config = config or DegradeConfig()
    ids = [row.id for row in rows]
    if len(set(ids)) != len(ids):
        raise DegradeError("rows: ids repeat, expected unique ids")
    bank = load_bank(split)
    used = [n for n, row in enumerate(rows) if statements_of(row)]
    sources = take_apart([rows[n] for n in used], bank)
    decks = Decks(bank, random.Random(f"{seed}:{split}:decks"))
    options: list[list[list[Response]]] = []
    for source in sources:
        rng = random.Random(f"{seed}:{split}:{source.row.id}")
        assert source.row.rubric is not None
        plans = plan_responses(source.row.rubric, decks, config, rng)
        can_edit = len(source.answer) >= 3
        edited = [can_edit and rng.random() < config.edited_share for _ in plans]
        options.append(
            [construct(source, bank, plans, edited, config, rng) for _ in range(config.candidates)]
        )
    measured = [
        [lengths(s.row, option, config.count_tokens) for option in group]
        for s, group in zip(sources, options, strict=True)
    ]
    done = list(rows)
    for number, group, pick in zip(used, options, balance(measured), strict=True):
        done[number] = rows[number].with_responses(group[pick])
    return DegradeResult(tuple(done), _count(done, used, config.count_tokens))
