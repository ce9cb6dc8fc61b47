"""What a run found, in words: the page's first sentences, its tiles, the terminal's last lines.

Sentences say "better" only where the paired difference's interval excludes 0, and name what cannot
be told apart too. The layout of `results` is that of `promedical.bench.report`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from promedical.bench import tables
from promedical.bench.tables import TIERS, decimal, grader_order, per_cent, span

__all__ = ["headline", "reference_grader", "story", "tiles"]

Json = Mapping[str, Any]

# How a grader is called within a sentence.
NAMES = {
    "scalar": "the scalar baseline",
    "untrained": "the untrained model",
    "criterion_alone": "the criterion's text alone",
    "response_alone": "the answer alone",
    "random": "random scores",
    "constant": "a constant",
    "static_embedding": "similarity of static embeddings",
}


def _figure(results: Json, grader: str, *path: str) -> Json | None:
    found: Any = results
    for key in ("bench", "graders", grader, *path):
        if not isinstance(found, Mapping):
            return None
        found = found.get(key)
    return found if isinstance(found, Mapping) and found.get("value") is not None else None


def reference_grader(results: Json) -> str:
    bench: Json = results.get("bench") or {}
    return str((bench.get("settings") or {}).get("reference") or "explicit")


# name, where its figure is, where its difference is, what it counts, unit
_MAIN = (
    (
        "Overall preference",
        ("overall", "accuracy"),
        ("overall_accuracy",),
        "better answer first",
        "pairs",
    ),
    *(
        (
            f"Within criterion, {label.lower()}",
            ("tiers", tier, "within_criterion"),
            ("within_criterion", tier),
            "same criterion, two answers",
            "pairs",
        )
        for tier, label in TIERS
    ),
    (
        "Safety veto, F1",
        ("veto", "per_criterion", "f1"),
        ("veto_f1",),
        "violations found",
        "verdicts",
    ),
)


def tiles(results: Json) -> list[dict[str, str]]:
    """The main figures, each beside the untrained model's."""
    made = []
    reference = reference_grader(results)
    for name, path, difference, hint, unit in _MAIN:
        figure = _figure(results, reference, *path)
        if figure is None:
            continue
        untrained = _figure(results, "untrained", *path)
        outcome: Any = (results["bench"].get("differences") or {}).get("untrained")
        for key in difference:
            outcome = (outcome or {}).get(key)
        cell = tables.difference_cell(outcome)
        made.append(
            {
                "name": name,
                "hint": hint,
                "value": f"{per_cent(figure['value'])} %",
                "interval": span(figure),
                "n": f"n = {figure['n']} {unit}",
                "beside": f"untrained {per_cent(untrained['value'])} %" if untrained else "",
                "mark": cell.mark if untrained else "none",
                "outcome": cell.text if untrained else "",
            }
        )
    return made


def story(results: Json) -> list[str]:
    """What happened, in a few plain sentences that say what cannot be told apart too."""
    told = [*_bench_story(results), *_physicians_story(results), *_policy_story(results)]
    return told or ["Nothing has been measured yet."]


def _bench_story(results: Json) -> list[str]:
    figure = _figure(results, reference_grader(results), "overall", "accuracy")
    if figure is None:
        return []
    told = [
        f"Of two answers to one question, the trained reward model prefers the right one in "
        f"{per_cent(figure['value'])} % of {figure['n']} pairs (95 % interval "
        f"{span(figure)})."
    ]
    differences: Json = results["bench"].get("differences") or {}
    groups: dict[str, list[str]] = {}
    for name in grader_order(list(differences), reference_grader(results)):
        cell = tables.difference_cell((differences[name] or {}).get("overall_accuracy"))
        if cell.mark != "none":
            groups.setdefault(cell.mark, []).append(
                NAMES.get(name, tables.grader_label(name).lower())
            )
    words = {
        "better": "There it is better than",
        "same": "It cannot be told apart from",
        "worse": "It is worse than",
    }
    said = [f"{words[m]} {_listed(groups[m])}." for m in words if m in groups]
    told[0] = " ".join([told[0], *said])
    veto = {
        key: _figure(results, reference_grader(results), "veto", "per_criterion", key)
        for key in ("precision", "recall", "f1")
    }
    if veto["precision"] and veto["recall"]:
        told.append(
            f"It finds {per_cent(veto['recall']['value'])} % of the violations, and "
            f"{per_cent(veto['precision']['value'])} % of what it flags are violations "
            f"(n = {veto['recall']['n']} answers and veto criteria)."
        )
    return told


def _physicians_story(results: Json) -> list[str]:
    part: Json = (results.get("bench") or {}).get("physicians") or {}
    graders: Json = part.get("graders") or {}
    figure = ((graders.get(reference_grader(results)) or {}).get("all") or {}).get("auroc") or {}
    if figure.get("value") is None:
        return []
    text = (
        f"On {figure['n']} labels that physicians gave to real answers its AUROC is "
        f"{decimal(figure['value'])} ({span(figure, decimal)})"
    )
    overlap = ((graders.get("word_overlap") or {}).get("all") or {}).get("auroc") or {}
    if overlap.get("value") is not None:
        difference = ((part.get("differences") or {}).get("word_overlap") or {}).get("auroc")
        outcome = tables.difference_cell(difference).text
        text += f"; plain word overlap has {decimal(overlap['value'])}"
        if outcome in ("better", "worse"):
            text += f", so here the model is {outcome} than counting shared words"
        elif outcome == "not distinguishable":
            text += ", which cannot be told apart"
    return [text + "."]


def _policy_story(results: Json) -> list[str]:
    metrics: Json = ((results.get("answers") or {}).get("compared") or {}).get("metrics") or {}
    reward: Json = metrics.get("reward") or {}
    base, tuned = (reward.get(who) or {} for who in ("base", "tuned"))
    if base.get("value") is None or tuned.get("value") is None:
        return []
    steps = (results.get("grpo") or {}).get("done_steps")
    after = f"After {steps} steps of GRPO" if steps else "After GRPO"
    cell = tables.difference_cell(reward.get("difference"), decimal)
    return [
        f"{after} the policy's mean reward goes from {decimal(base['value'])} to "
        f"{decimal(tuned['value'])}, graded by the reward it was trained on "
        f"({cell.text}: {cell.detail})."
    ]


def _listed(names: Sequence[str]) -> str:
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"


def headline(results: Json) -> list[str]:
    """The run's figures as at most ten aligned lines for the terminal."""
    columns = [reference_grader(results), "untrained", "scalar", "word_overlap"]
    titles = ["trained", "untrained", "scalar", "word overlap"]
    rows: list[tuple[str, list[str]]] = []
    for name, path, *_ in _MAIN:
        cells = [_short(_figure(results, grader, *path), per_cent) for grader in columns]
        if any(c != "—" for c in cells):
            rows.append((name, cells))
    physicians: Json = (results.get("bench") or {}).get("physicians") or {}
    graders: Json = physicians.get("graders") or {}
    labels = [((graders.get(g) or {}).get("all") or {}).get("auroc") for g in columns]
    if any(f and f.get("value") is not None for f in labels):
        rows.append(("Physicians' labels, AUROC", [_short(f, decimal) for f in labels]))
    out = []
    if rows:
        n = (((results.get("bench") or {}).get("gold") or {}).get("bench") or {}).get(
            "instructions"
        )
        head = f"{n} questions: % (95 % range)" if n else "% (95 % range)"
        out += [
            f"{name:<30}" + "".join(f"{cell:>18}" for cell in cells)
            for name, cells in [(head, titles), *rows]
        ]
    for sentence in _policy_story(results):
        out += textwrap.wrap(sentence, 30 + 18 * len(columns), subsequent_indent="  ")
    out.append("Small n, little training, research use only: no medical device.")
    return out[:10]


def _short(figure: Json | None, form: tables.Formatter) -> str:
    if not figure or figure.get("value") is None:
        return "—"
    interval = span(figure, form)
    return f"{form(figure['value'])} ({interval})" if interval else form(figure["value"])
