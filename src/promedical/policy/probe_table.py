"""The probe of a reward as a table for a terminal, and its figures in a line.

Left to others: what is in it (`promedical.policy.probe`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from promedical.bench.intervals import Figure

if TYPE_CHECKING:
    from promedical.policy.probe import Probe

__all__ = ["as_text", "per_cent", "signed"]


def as_text(found: Probe, name: str) -> str:
    """The probe as a table for a terminal."""
    heads = ["answers", "reward", "S1", "S2", "S3", "any violation", "beats reference"]
    based = any(a.role == "base" for a in found.answers)
    if based:
        heads.append("over the starting policy")
    table = [heads]
    for a in found.answers:
        mark = {"upper bound": " *", "reference": "", "base": "", "null": ""}[a.role]
        f = a.figures
        cells = [
            a.label + mark,
            signed(f["reward"], sign=False),
            _plain(f["s1"]),
            _plain(f["s2"]),
            _plain(f["s3"]),
            "—" if f["veto_rate"].value is None else f"{f['veto_rate'].value:.0%}",
            "" if a.over_reference is None else per_cent(a.over_reference),
        ]
        if based:
            cells.append("" if a.over_base is None else signed(a.over_base))
        table.append(cells)
    widths = [max(len(row[k]) for row in table) for k in range(len(heads))]
    lines = [
        "  ".join(
            cell.ljust(width) if k == 0 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
    lines.insert(1, "─" * max(map(len, lines)))
    s = found.spec
    notes = [
        f"reward of {name}: α {s.alpha:g}, β {s.beta:g}, λ {s.lam:g}"
        + (f", ablation {s.ablation}" if s.ablation else "")
        + f"; {found.prompts} prompts; 95 % intervals over prompts"
    ]
    if any(a.role == "upper bound" for a in found.answers):
        notes.append("* has seen the rubric, which no policy does; it does not count")
    if found.without_reference:
        notes.append(f"{found.without_reference} prompts have no reference answer")
    failed = sum(a.failed for a in found.answers)
    if failed:
        notes.append(f"{failed} answers could not be graded; they are in no figure")
    verdict = [f"{found.outcome}: {found.reasons[0]}"]
    verdict += [" " * (len(found.outcome) + 2) + reason for reason in found.reasons[1:]]
    return "\n".join([*lines, *notes, "", *verdict])


def _plain(figure: Figure) -> str:
    return "—" if figure.value is None else f"{figure.value:.2f}"


def signed(figure: Figure, *, sign: bool = True) -> str:
    """A value with its interval; a difference shows its sign."""
    if figure.value is None or figure.low is None or figure.high is None:
        return "—"
    form = "{:+.2f}" if sign else "{:.2f}"
    values = [form.format(v).replace("-", "−") for v in (figure.value, figure.low, figure.high)]
    return f"{values[0]} [{values[1]}, {values[2]}]"


def per_cent(figure: Figure) -> str:
    """A share with its interval, in per cent."""
    if figure.value is None or figure.low is None or figure.high is None:
        return "—"
    return f"{figure.value:.0%} [{100 * figure.low:.0f}, {100 * figure.high:.0f}]"
