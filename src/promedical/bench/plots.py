"""Plots as inline SVG: lines over steps, dots with intervals, reliability, distributions.

Drawn by hand rather than by a plotting library so that one page reads well on a phone and on a
desk, in light and in dark: colours are the page's CSS variables (`--c0`…, colour-blind safe, and
never the only carrier: series also differ in dash or shape), text is the page's own, and the view
box is as wide as a phone so that nothing shrinks. Output depends on the input alone.

Every function returns an `<svg role="img">` with a title and a description that says in words what
the plot shows. What to plot, and the captions, are left to `promedical.bench.report`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

__all__ = ["Bin", "Dot", "Series", "dots", "intervals", "lines", "reliability"]

WIDTH = 360
LEFT, RIGHT = 44, 10
DASHES = ("", "7 4", "2 3", "9 3 2 3")
CHARACTER = 6.0  # width of an average character at the plots' 11.5 px
MAX_POINTS = 240


@dataclass(frozen=True)
class Series:
    """A named line; a point whose y is None or not finite leaves a gap.

    Args:
        name: for the legend.
        points: (x, y) with x rising.
        colour: 0–3, picks colour and dash.
        smooth: draw the points faintly and a running mean over a tenth of them strongly.
    """

    name: str
    points: tuple[tuple[float, float | None], ...]
    colour: int = 0
    smooth: bool = False


@dataclass(frozen=True)
class Dot:
    """A value with its interval; a value of None is drawn as a dash with the reason.

    Args:
        name: what is measured.
        value, low, high: the figure.
        colour: 0–3; 3 and above are muted.
        reason: why there is no value.
    """

    name: str
    value: float | None
    low: float | None
    high: float | None
    colour: int = 0
    reason: str = "undefined"


@dataclass(frozen=True)
class Bin:
    """One bin of a reliability diagram.

    Args:
        predicted: mean predicted probability in the bin.
        observed, low, high: share that was met, with its interval.
        n: verdicts in the bin.
    """

    predicted: float
    observed: float
    low: float | None
    high: float | None
    n: int


def lines(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str = "step",
    y_range: tuple[float, float] | None = None,
    height: int = 220,
    reference: tuple[float, str] | None = None,
) -> Markup:
    """Lines over steps.

    Args:
        series: at most four.
        title: names the plot for a screen reader; captions are the page's.
        y_range: shows at least this range.
        reference: a horizontal line and what it means.
    """
    drawn = [s for s in series if _finite(s)]
    if not drawn:
        return _empty(title)
    legend, top = _legend([(s.name, s.colour) for s in drawn])
    points = [p for s in drawn for p in _finite(s)]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    if reference is not None:
        ys.append(reference[0])
    low, high = min(ys), max(ys)
    if y_range is not None:
        low, high = min(low, y_range[0]), max(high, y_range[1])
    y = _Scale.nice(low, high, height - 36, top + 4, count=4)
    x = _Scale(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, LEFT, WIDTH - RIGHT)
    body = [legend, _y_axis(y), _x_axis(x, height - 36, x_label, whole=True)]
    if reference is not None:
        value, meaning = reference
        at = y(value)
        body.append(
            f'<line class="ref" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_n(at)}" y2="{_n(at)}"/>'
            f'<text class="note" x="{WIDTH - RIGHT}" y="{_n(at - 4)}" text-anchor="end">'
            f"{escape(meaning)}</text>"
        )
    for s in drawn:
        thin = _thinned(s.points)
        if s.smooth and len(_finite(s)) >= 20:
            body.append(_path(thin, x, y, f"line c{s.colour % 4} faint", ""))
            thin = _thinned(_running_mean(s.points))
        body.append(_path(thin, x, y, f"line c{s.colour % 4}", DASHES[s.colour % 4]))
    return _svg(height, title, " ".join(_describe_line(s, x_label) for s in drawn), body)


def intervals(
    groups: Sequence[Dot],
    *,
    title: str,
    reference: tuple[float, str] | None = None,
    x_range: tuple[float, float] = (0.0, 1.0),
    label_width: int = 134,
) -> Markup:
    """One row for each value: a dot and its 95 % interval.

    Args:
        groups: the rows from top to bottom.
        reference: a vertical line and what it means.
        x_range: shows at least this range.
    """
    if not groups:
        return _empty(title)
    row, top = 21, 8
    bottom = top + row * len(groups)
    low, high = x_range
    for dot in groups:
        for value in (dot.value, dot.low, dot.high):
            if value is not None and math.isfinite(value):
                low, high = min(low, value), max(high, value)
    x = _Scale(low, high, label_width, WIDTH - RIGHT - 4)
    body = [_x_axis(x, bottom, "", ticks=_ticks(low, high, 5), grid_from=top)]
    if reference is not None:
        at = x(reference[0])
        body.append(f'<line class="ref" x1="{_n(at)}" x2="{_n(at)}" y1="{top}" y2="{bottom}"/>')
        anchor = "middle" if abs(at - (label_width + WIDTH) / 2) < 80 else "end"
        body.append(
            f'<text class="note" x="{_n(at)}" y="{bottom + 30}" text-anchor="{anchor}">'
            f"{escape(reference[1])}</text>"
        )
    said = []
    for number, dot in enumerate(groups):
        middle = top + row * number + row / 2
        body.append(
            f'<text class="label" x="{label_width - 8}" y="{_n(middle + 4)}" text-anchor="end">'
            f"{escape(_shortened(dot.name, int((label_width - 10) / CHARACTER)))}</text>"
        )
        if dot.value is None or not math.isfinite(dot.value):
            body.append(
                f'<text class="note" x="{label_width}" y="{_n(middle + 4)}">'
                f"— {escape(_shortened(dot.reason, 34))}</text>"
            )
            said.append(f"{dot.name}: none ({dot.reason}).")
            continue
        look = f"c{dot.colour}" if dot.colour < 3 else "muted"
        if dot.low is not None and dot.high is not None:
            body.append(
                f'<line class="whisker {look}" x1="{_n(x(dot.low))}" x2="{_n(x(dot.high))}" '
                f'y1="{_n(middle)}" y2="{_n(middle)}"/>'
            )
        body.append(_marker(dot.colour, x(dot.value), middle, look))
        said.append(_describe_dot(dot))
    extra = 36 if reference is not None else 22
    return _svg(bottom + extra, title, " ".join(said), body)


def reliability(bins: Sequence[Bin], *, title: str) -> Markup:
    """Predicted probability against observed share, a dot's area growing with its verdicts."""
    if not bins:
        return _empty(title)
    top, bottom = 10, 270
    x = _Scale(0, 1, LEFT, WIDTH - RIGHT)
    y = _Scale(0, 1, bottom, top)
    body = [
        _y_axis(y, label="share that was true"),
        _x_axis(x, bottom, "predicted probability", ticks=_ticks(0, 1, 5)),
        f'<line class="ref" x1="{_n(x(0))}" y1="{_n(y(0))}" x2="{_n(x(1))}" y2="{_n(y(1))}"/>',
        f'<text class="note" x="{_n(x(0.03))}" y="{_n(y(0.965))}">dashed: perfectly calibrated'
        "</text>",
    ]
    most = max(b.n for b in bins)
    for b in bins:
        if b.low is not None and b.high is not None:
            body.append(
                f'<line class="whisker c0" x1="{_n(x(b.predicted))}" x2="{_n(x(b.predicted))}" '
                f'y1="{_n(y(b.low))}" y2="{_n(y(b.high))}"/>'
            )
    path = tuple((b.predicted, b.observed) for b in bins)
    body.append(_path(path, x, y, "line c0 faint", ""))
    for b in bins:
        radius = 2.5 + 5 * math.sqrt(b.n / most)
        body.append(
            f'<circle class="dot c0" cx="{_n(x(b.predicted))}" cy="{_n(y(b.observed))}" '
            f'r="{_n(radius)}"/>'
        )
    said = " ".join(
        f"Predicted {b.predicted:.2f}, observed {b.observed:.2f} (n = {b.n})." for b in bins
    )
    return _svg(bottom + 36, title, said, body)


def dots(rows: Sequence[tuple[str, Sequence[float], Dot]], *, title: str, x_label: str) -> Markup:
    """Every value of each row as a dot, stacked where they are close, its mean and interval below.

    Args:
        rows: (name, values, mean with its interval), at most four.
    """
    rows = [(name, [v for v in values if math.isfinite(v)], mean) for name, values, mean in rows]
    everything = [v for _, values, _ in rows for v in values]
    if not everything:
        return _empty(title)
    low, high = min(everything), max(everything)
    ticks = _ticks(low, high, 5)
    x = _Scale(min(low, ticks[0]), max(high, ticks[-1], low + 1e-9), 16, WIDTH - 16)
    columns, step, row_height = 54, 5.6, 96.0
    body, said, top = [], [], 4.0
    tallest = max(max(_stacks(values, x, columns).values(), default=1) for _, values, _ in rows)
    step = min(step, (row_height - 46) / tallest)
    for number, (name, values, mean) in enumerate(rows):
        base = top + row_height * (number + 1) - 26
        body.append(
            f'<text class="label strong" x="16" y="{_n(base - row_height + 42)}">'
            f"{escape(name)}</text>"
        )
        for column, count in sorted(_stacks(values, x, columns).items()):
            at = 16 + (column + 0.5) * (WIDTH - 32) / columns
            body.extend(
                f'<circle class="dot c{number % 4} soft" cx="{_n(at)}" '
                f'cy="{_n(base - step * (i + 0.5))}" r="{_n(min(2.7, step / 2))}"/>'
                for i in range(count)
            )
        body.append(
            f'<line class="grid" x1="16" x2="{WIDTH - 16}" y1="{_n(base)}" y2="{_n(base)}"/>'
        )
        if mean.value is not None:
            if mean.low is not None and mean.high is not None:
                body.append(
                    f'<line class="whisker c{number % 4}" x1="{_n(x(mean.low))}" '
                    f'x2="{_n(x(mean.high))}" y1="{_n(base + 9)}" y2="{_n(base + 9)}"/>'
                )
            body.append(_marker(number, x(mean.value), base + 9, f"c{number % 4}"))
        said.append(f"{name}: {len(values)} values, mean {_describe_dot(mean)}")
    bottom = top + row_height * len(rows)
    body.append(_x_axis(x, bottom - 4, x_label, ticks=ticks))
    return _svg(int(bottom + 34), title, " ".join(said), body)


class _Scale:
    """Maps data to pixels, linearly."""

    def __init__(
        self, low: float, high: float, start: float, end: float, ticks: Sequence[float] = ()
    ) -> None:
        self.low, self.high, self.start, self.end = low, high, start, end
        self.ticks = ticks

    @classmethod
    def nice(cls, low: float, high: float, start: float, end: float, *, count: int) -> _Scale:
        ticks = _ticks(low, high, count)
        return cls(min(low, ticks[0]), max(high, ticks[-1]), start, end, ticks)

    def __call__(self, value: float) -> float:
        span = (self.high - self.low) or 1.0
        return self.start + (value - self.low) / span * (self.end - self.start)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers that enclose [low, high]."""
    if high <= low:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((m * power for m in (1, 2, 2.5, 5) if m * power >= raw * 0.999), 10 * power)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _y_axis(y: _Scale, label: str = "") -> str:
    parts = []
    ticks = y.ticks or _ticks(y.low, y.high, 4)
    for tick in ticks:
        at = y(tick)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_n(at)}" y2="{_n(at)}"/>'
            f'<text class="tick" x="{LEFT - 6}" y="{_n(at + 4)}" text-anchor="end">'
            f"{_number(tick, ticks)}</text>"
        )
    if label:
        middle = (y.start + y.end) / 2
        parts.append(
            f'<text class="tick" x="11" y="{_n(middle)}" text-anchor="middle" '
            f'transform="rotate(-90 11 {_n(middle)})">{escape(label)}</text>'
        )
    return "".join(parts)


def _x_axis(
    x: _Scale,
    at: float,
    label: str,
    *,
    ticks: Sequence[float] | None = None,
    whole: bool = False,
    grid_from: float | None = None,
) -> str:
    if ticks is None:
        ticks = _ticks(x.low, x.high, 5)
    ticks = [
        t for t in ticks if x.low - 1e-9 <= t <= x.high + 1e-9 and not (whole and t != round(t))
    ]
    parts = [f'<line class="axis" x1="{_n(x.start)}" x2="{_n(x.end)}" y1="{at}" y2="{at}"/>']
    for tick in ticks:
        if grid_from is not None:
            parts.append(
                f'<line class="grid" x1="{_n(x(tick))}" x2="{_n(x(tick))}" y1="{grid_from}" '
                f'y2="{at}"/>'
            )
        parts.append(
            f'<text class="tick" x="{_n(x(tick))}" y="{_n(at + 15)}" text-anchor="middle">'
            f"{_number(tick, ticks)}</text>"
        )
    if label:
        middle = (x.start + x.end) / 2
        parts.append(
            f'<text class="tick" x="{_n(middle)}" y="{_n(at + 31)}" text-anchor="middle">'
            f"{escape(label)}</text>"
        )
    return "".join(parts)


def _legend(entries: Sequence[tuple[str, int]]) -> tuple[str, int]:
    """The legend's marks and the height it takes; lines wrap at the plot's width."""
    if len(entries) < 2:
        return "", 6
    parts, left, top = [], float(LEFT), 12
    for name, colour in entries:
        width = 26 + CHARACTER * len(name) + 12
        if left + width > WIDTH and left > LEFT:
            left, top = float(LEFT), top + 17
        parts.append(
            f'<line class="line c{colour % 4}" x1="{_n(left)}" x2="{_n(left + 20)}" y1="{top - 4}" '
            f'y2="{top - 4}" stroke-dasharray="{DASHES[colour % 4]}"/>'
            f'<text class="label" x="{_n(left + 25)}" y="{top}">{escape(name)}</text>'
        )
        left += width
    return "".join(parts), top + 8


def _marker(colour: int, x: float, y: float, look: str) -> str:
    """Circle, square, diamond, or a small circle for what is muted."""
    if colour == 1:
        return f'<rect class="dot {look}" x="{_n(x - 4)}" y="{_n(y - 4)}" width="8" height="8"/>'
    if colour == 2:
        return f'<path class="dot {look}" d="M{_n(x)} {_n(y - 5.5)}l5.5 5.5l-5.5 5.5l-5.5 -5.5z"/>'
    return f'<circle class="dot {look}" cx="{_n(x)}" cy="{_n(y)}" r="{3.4 if colour else 4.6}"/>'


def _path(
    points: Iterable[tuple[float, float | None]], x: _Scale, y: _Scale, look: str, dash: str
) -> str:
    parts, pen, alone = [], "M", []
    kept = list(points)
    for i, (px, py) in enumerate(kept):
        if py is None or not math.isfinite(py):
            pen = "M"
            continue
        neighbours = [kept[j][1] for j in (i - 1, i + 1) if 0 <= j < len(kept)]
        if all(v is None or not math.isfinite(v) for v in neighbours):
            alone.append((px, py))  # a line of one point would be invisible
        parts.append(f"{pen}{_n(x(px))} {_n(y(py))}")
        pen = "L"
    circles = "".join(
        f'<circle class="dot {look.split()[1]}" cx="{_n(x(px))}" cy="{_n(y(py))}" r="2.6"/>'
        for px, py in alone
    )
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<path class="{look}"{dashed} d="{"".join(parts)}"/>{circles}'


def _finite(series: Series) -> list[tuple[float, float]]:
    return [(x, y) for x, y in series.points if y is not None and math.isfinite(y)]


def _running_mean(
    points: Sequence[tuple[float, float | None]],
) -> tuple[tuple[float, float | None], ...]:
    half = max(1, len(points) // 20)
    smooth: list[tuple[float, float | None]] = []
    for i, (x, _) in enumerate(points):
        near = [y for _, y in points[max(0, i - half) : i + half + 1]]
        known = [y for y in near if y is not None and math.isfinite(y)]
        smooth.append((x, math.fsum(known) / len(known) if known else None))
    return tuple(smooth)


def _thinned(
    points: Sequence[tuple[float, float | None]],
) -> tuple[tuple[float, float | None], ...]:
    """At most `MAX_POINTS` points, means of neighbours, so that long runs make no heavy page."""
    if len(points) <= MAX_POINTS:
        return tuple(points)
    size = math.ceil(len(points) / MAX_POINTS)
    thin: list[tuple[float, float | None]] = []
    for i in range(0, len(points), size):
        chunk = points[i : i + size]
        known = [y for _, y in chunk if y is not None and math.isfinite(y)]
        thin.append((chunk[len(chunk) // 2][0], math.fsum(known) / len(known) if known else None))
    return tuple(thin)


def _stacks(values: Sequence[float], x: _Scale, columns: int) -> dict[int, int]:
    counts: dict[int, int] = {}
    for value in values:
        share = (x(value) - 16) / (WIDTH - 32)
        column = min(columns - 1, max(0, int(share * columns)))
        counts[column] = counts.get(column, 0) + 1
    return counts


def _describe_line(series: Series, x_label: str) -> str:
    known = _finite(series)
    (first_x, first), (last_x, last) = known[0], known[-1]
    ys = [y for _, y in known]
    return (
        f"{series.name}: {first:.3g} at {x_label} {first_x:g}, {last:.3g} at {x_label} {last_x:g}, "
        f"between {min(ys):.3g} and {max(ys):.3g}."
    )


def _describe_dot(dot: Dot) -> str:
    if dot.value is None:
        return f"{dot.name}: none."
    if dot.low is None or dot.high is None:
        return f"{dot.name}: {dot.value:.3f}."
    return f"{dot.name}: {dot.value:.3f}, interval {dot.low:.3f} to {dot.high:.3f}."


def _empty(title: str) -> Markup:
    body = [f'<text class="label" x="{WIDTH / 2:g}" y="44" text-anchor="middle">not run</text>']
    return _svg(80, title, "There is nothing to plot: this part was not run.", body)


def _svg(height: int, title: str, description: str, body: Iterable[str]) -> Markup:
    return Markup(
        f'<svg class="plot" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}. {escape(description)}">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"
        f"{''.join(body)}</svg>"
    )


def _number(tick: float, ticks: Sequence[float]) -> str:
    step = min((b - a for a, b in itertools.pairwise(ticks)), default=1.0)
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 0
    if digits and round(step, digits) != round(step, 10):
        digits += 1  # a step of 0.25 needs two
    text = f"{tick:.{digits}f}"
    return text.replace("-", "−") if float(text) else f"{0:.{digits}f}"


def _n(value: float) -> str:
    """A coordinate, to a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0")


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: max(1, limit - 1)].rstrip() + "…"
