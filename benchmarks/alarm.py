"""How often the monitor's alarm is wrong, and how late it is right, on simulated curves.

    python benchmarks/alarm.py                 # the full run, under a minute on one core
    python benchmarks/alarm.py --small --out result.json
    python benchmarks/alarm.py --table         # the committed result as a table

A run has 20 evaluations of 24 or 48 held-out prompts. The training reward rises for certain, so
everything hangs on the gold reward, which in a healthy run has no trend but noise:

independent     of every prompt and evaluation anew, deviation 0.3
violations      small noise, and −λ on a tenth of the answers, anew every time
sticky          −λ on a tenth of the prompts, which they keep for some evaluations
wandering       of every prompt a random walk of its own, deviation 0.1 a step
swings 0.03     independent, and a common swing that passes: AR(1), 0.6, deviation 0.03
swings 0.1      the same, larger: for some evaluations the policy does get worse
drift 0.03      independent, and a common random walk

or from the eighth evaluation on it falls by a constant each time, under independent noise.
Counted are runs in which the gold reward is found to fall:

percentile      by the paired bootstrap's percentile end at the corrected level, one check
sign flips      by the sign-flip test at that level, one check
alarm           the rule as it is by default: sign flips, two checks in a row, at least 0.03
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from promedical.bench.intervals import Bootstrap
from promedical.policy.alarm import FLIPS, AlarmRule, _signs
from promedical.provenance import provenance

RESULT = Path(__file__).parent / "results" / "alarm.json"
SEED = 0
LAM = 1.5
EVALUATIONS = 20
TURN = 8
RULE = AlarmRule()
RESAMPLES = 4_000

Curve = Callable[[np.random.Generator, int], np.ndarray]


def independent(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.normal(0.5, 0.3, (EVALUATIONS, n))


def violations(rng: np.random.Generator, n: int) -> np.ndarray:
    small = rng.normal(0.5, 0.2, (1, n)) + rng.normal(0, 0.05, (EVALUATIONS, n))
    return small - LAM * (rng.random((EVALUATIONS, n)) < 0.1)


def sticky(rng: np.random.Generator, n: int) -> np.ndarray:
    state = rng.random(n) < 0.1
    rows = []
    for _ in range(EVALUATIONS):
        # 0.1 · 0.3 = 0.9 · 1/30: a tenth at any time.
        state = np.where(state, rng.random(n) < 0.7, rng.random(n) < 1 / 30)
        rows.append(0.5 - LAM * state)
    return np.array(rows)


def wandering(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.cumsum(rng.normal(0, 0.1, (EVALUATIONS, n)), axis=0)


def swings(deviation: float) -> Curve:
    def curve(rng: np.random.Generator, n: int) -> np.ndarray:
        common = [0.0]
        for _ in range(EVALUATIONS - 1):
            common.append(0.6 * common[-1] + rng.normal(0, deviation))
        return independent(rng, n) + np.array(common)[:, None]

    return curve


def drift(rng: np.random.Generator, n: int) -> np.ndarray:
    return independent(rng, n) + np.cumsum(rng.normal(0, 0.03, EVALUATIONS))[:, None]


def falling(slope: float) -> Curve:
    fall = slope * np.maximum(0, np.arange(EVALUATIONS) - TURN)[:, None]
    return lambda rng, n: independent(rng, n) - fall


HEALTHY: dict[str, Curve] = {
    "independent": independent,
    "violations": violations,
    "sticky": sticky,
    "wandering": wandering,
    "swings 0.03": swings(0.03),
    "swings 0.1": swings(0.1),
    "drift 0.03": drift,
}
FALLING: dict[str, Curve] = {f"falls {s} each": falling(s) for s in (0.04, 0.08)}


def changes(gold: np.ndarray) -> np.ndarray:
    """[runs, windows, prompts], d of every window, of gold rewards [runs, evaluations, prompts]."""
    x = np.arange(RULE.window) - (RULE.window - 1) / 2
    weights = x / (x @ x) * (RULE.window - 1)
    windows = np.lib.stride_tricks.sliding_window_view(gold, RULE.window, axis=1)
    return (windows - windows[..., :1]) @ weights


def p_falls(d: np.ndarray) -> np.ndarray:
    """`Change.p_fall` of every window at once: one matrix product in place of many."""
    flat = d.reshape(-1, d.shape[-1])
    size, total = np.sort(np.abs(flat), axis=1), flat.sum(axis=1)
    bound = (total + 1e-9 * size.sum(axis=1))[:, None]
    signs = _signs(d.shape[-1]).T
    found = []
    for start in range(0, len(flat), 200):
        part = slice(start, start + 200)
        half = size[part] @ signs
        at_most = (half <= bound[part]).sum(axis=1) + (-half <= bound[part]).sum(axis=1)
        found.append((1 + at_most) / (1 + FLIPS))
    return np.concatenate(found).reshape(d.shape[:2])


def percentile_falls(d: np.ndarray, level: float) -> np.ndarray:
    """Of every window whether the upper percentile end of its change is below 0."""
    n = d.shape[-1]
    counts = Bootstrap(n, resamples=RESAMPLES, confidence=1 - 2 * level).counts.T / n
    flat = d.reshape(-1, n)
    ends = [
        np.percentile(flat[start : start + 200] @ counts, 100 * (1 - level), axis=1)
        for start in range(0, len(flat), 200)
    ]
    return (np.concatenate(ends) < 0).reshape(d.shape[:2])


def shares(kind: str, name: str, curve: Curve, prompts: int, count: int) -> dict[str, Any]:
    """In how many of so many runs each way of looking finds a fall, and how late the alarm is."""
    rng = np.random.default_rng(SEED)
    d = changes(np.array([curve(rng, prompts) for _ in range(count)]))
    level = RULE.level(EVALUATIONS)
    falls = p_falls(d) <= level
    shown = falls & (d.mean(axis=-1) <= -RULE.least_fall)
    twice = shown[:, 1:] & shown[:, :-1]
    # The first window ends at evaluation W − 1, the first pair of them one later.
    at = np.argmax(twice, axis=1)[twice.any(axis=1)] + RULE.window
    return {
        "kind": kind,
        "curve": name,
        "prompts": prompts,
        "percentile": float(percentile_falls(d, level).any(axis=1).mean()),
        "sign_flips": float(falls.any(axis=1).mean()),
        "alarm": float(twice.any(axis=1).mean()),
        "evaluations_after_the_turn": float((at - TURN).mean())
        if kind == "falling" and len(at)
        else None,
    }


def measure(count: int, out: Path) -> dict[str, Any]:
    """Shares of runs, for every curve and number of prompts; goes on where it was stopped."""
    part = out.with_name(f".{out.name}.part")
    result: dict[str, Any] = {"runs": count, "evaluations": EVALUATIONS, "measured": []}
    if part.exists() and json.loads(part.read_text(encoding="utf-8"))["runs"] == count:
        result = json.loads(part.read_text(encoding="utf-8"))
    done = {(entry["curve"], entry["prompts"]) for entry in result["measured"]}
    for kind, curves in (("healthy", HEALTHY), ("falling", FALLING)):
        for name, curve in curves.items():
            for prompts in (24, 48):
                if (name, prompts) in done:
                    continue
                result["measured"].append(shares(kind, name, curve, prompts, count))
                part.write_text(json.dumps(result), encoding="utf-8")
    part.unlink()
    return result


def as_markdown(result: dict[str, Any]) -> str:
    """The table of docs/monitor.md: per cent of runs, with 24 and with 48 prompts."""
    lines = [
        "| gold curve | percentile end | sign flips | alarm | evaluations until it |",
        "|---|---|---|---|---|",
    ]
    rows: dict[str, list[dict[str, Any]]] = {}
    for entry in result["measured"]:
        rows.setdefault(entry["curve"], []).append(entry)
    for curve, both in rows.items():
        cells = [
            " / ".join(f"{100 * entry[way]:.1f}" for entry in both)
            for way in ("percentile", "sign_flips", "alarm")
        ]
        late = [entry["evaluations_after_the_turn"] for entry in both]
        cells.append(" / ".join("—" if v is None else f"{v:.1f}" for v in late))
        lines.append(f"| {curve} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and write the result, or show the committed one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a try: few runs")
    parser.add_argument("--table", action="store_true", help="print the committed result")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.table:
        print(as_markdown(json.loads(RESULT.read_text(encoding="utf-8"))))
        return
    count = 2 if options.small else 200
    options.out.parent.mkdir(parents=True, exist_ok=True)
    result = measure(count, options.out)
    result |= {"provenance": provenance(seed=SEED, recipe={"runs": count})}
    staging = options.out.with_name(f".{options.out.name}.tmp")
    staging.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(staging, options.out)


if __name__ == "__main__":
    main()
