"""Tables and lines of the documents on audit, policy training and review: what benchmarks measured.

They come from the JSON that `benchmarks/{audit,policy_step,review}.py` leave; the comparison of
policies has its own (`promedical.policy.compare_report`). Markdown is left to `promedical.figures`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from promedical.bench.tables import Cell, Column, Row, Table

__all__ = ["audit_line", "policy_step_table", "review_tables"]

Json = Mapping[str, Any]

DATABASES = {"sqlite": "SQLite", "postgresql": "PostgreSQL"}
VARIANTS = {
    "recipe": "as the recipe has it: the group is one tree",
    "one_by_one": "every answer graded by itself",
    "short": "answers of at most 64 tokens",
    "two_prompts": "two instructions a step",
    "overlap": "groups graded while the step goes on",
}


def audit_line(result: Json) -> str:
    """How long an audit takes."""
    settings, work = result["settings"], result["work"]
    return (
        f"{settings['answers']:,} answers × {settings['criteria']} criteria, "
        f"{result['model']}, {settings['threads']} threads: {result['audit_s'] / 60:.1f} minutes, "
        f"{result['answers_per_s']:.1f} answers and {result['judgments_per_s']:.0f} judgments a "
        f"second, {result['peak_memory_gb']:.1f} GB at most. {work['tokens']:,} tokens were read, "
        f"{work['tokens_as_separate_sequences']:,} as separate sequences. Writing table and page "
        f"took {result['files_s']:.1f} s; the same audit again, which grades nothing, "
        f"{result['resume_s']:.1f} s."
    )


def policy_step_table(result: Json) -> Table:
    """Where the time of a GRPO step goes."""
    rows = [
        Row(
            f"{name}: {VARIANTS[name]}" if name in VARIANTS else name,
            (
                Cell(f"{found['seconds']:.1f}"),
                Cell(f"{found['generation']:.1f}"),
                Cell(f"{found['grading']:.1f}"),
                Cell(f"{found['rest']:.1f}"),
                Cell(f"{100 * found['grading_share']:.1f} %"),
                Cell(f"{100 * found['grading_cpu_share']:.1f} %"),
                Cell(f"{found['tokens']:.0f}"),
            ),
            False,
            name == "recipe",
        )
        for name, found in result["variants"].items()
    ]
    labels = (
        "Step, s",
        "Sampling, s",
        "Waiting for grades, s",
        "Rest, s",
        "Grading, share of the step",
        "… of computing",
        "Tokens an answer",
    )
    return Table(
        "Where a step's time goes",
        f"Medians over steps; {result['criteria']:.1f} criteria a rubric, {result['threads']} "
        "threads.",
        "Variant",
        tuple(Column(label) for label in labels),
        tuple(rows),
    )


def review_tables(result: Json) -> list[Table]:
    """Saving under load, and what is there after the server was killed."""
    settings = result["settings"]
    load = [
        Row(
            DATABASES.get(kind, kind),
            (
                Cell(f"{found['saves']:,}"),
                Cell(f"{found['saves_per_s']:.0f}"),
                Cell(str(found["errors"])),
                Cell(str(found["lost"])),
                Cell(f"{found['latency']['p50_ms']:.0f}"),
                Cell(f"{found['latency']['p95_ms']:.0f}"),
                Cell(f"{found['latency']['p99_ms']:.0f}"),
            ),
            False,
            False,
        )
        for kind, found in result["load"].items()
    ]
    killed = [
        Row(
            DATABASES.get(kind, kind),
            (
                Cell(str(len(found["restarts"]))),
                Cell(f"{found['saves']:,}"),
                Cell(str(found["lost"])),
                Cell(str(found["errors"])),
                Cell(f"{found['sent_again']:,}"),
            ),
            False,
            False,
        )
        for kind, found in result["killed"].items()
    ]
    heads = ("Saves", "a second", "Errors", "Lost", "p50, ms", "p95, ms", "p99, ms")
    after = ("SIGKILLs", "Acknowledged saves", "Lost", "Errors", "Sent again")
    return [
        Table(
            "Saving under load",
            f"{settings['reviewers']} reviewers at once, a save every {settings['interval']:g} s "
            f"for {settings['seconds']:g} s; aim: no error, nothing lost, p95 under "
            f"{result['targets']['p95 at most, ms']} ms.",
            "Database",
            tuple(Column(label) for label in heads),
            tuple(load),
        ),
        Table(
            "The server killed under that load",
            "Every save that was acknowledged has to be there after the restart.",
            "Database",
            tuple(Column(label) for label in after),
            tuple(killed),
        ),
    ]
