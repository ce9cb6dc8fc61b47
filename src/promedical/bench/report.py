"""One self-contained HTML page about a run, and the last lines it prints in the terminal.

The page needs no network and no script: style and plots are inline. Texts of models and data pass
through Jinja's autoescaping and are shown as text. A section whose part of the results is missing
says "not run". Tables are made in `tables`, plots in `plots`, sentences in
`story`; what a figure means is in `metrics`.

Layout of `results`, a plain JSON dict that `promedical.quickstart.collect` fills; any key may be
missing, and more keys do no harm:

    mode, model      "default", "fast" or "full"; name of the model
    stages           [{"name", "title", "seconds", "planned_seconds", "tokens", "planned_tokens",
                     "note"}], numbers may be null
    data             {"dropped": {reason: count}, "splits": {split: {"counts": {what: count}}}}
    train            {"explicit" | "scalar": asdict(TrainResult)}
    bench            what `promedical.bench.evaluate.evaluate` returns, and
                     {"physicians": what `physicians` returns, "calibration": Calibration.to_json(),
                     "failed_judgments", "tokens"}
    grpo             asdict(GrpoResult) without its paths; "history" is [asdict(GrpoStep)]
    reward_spec      {"alpha", "beta", "lam", "ablation"}
    answers          {"answers": {"base" | "tuned": [{"instruction_id", "text", "reward", …}]},
                     "cut": {"base" | "tuned": count}, "compared": {"ungraded": count, "metrics":
                     {"reward" | "s1" | "s2" | "s3" | "veto_rate" | "tokens":
                     {"base": figure, "tuned": figure, "difference": difference}}},
                     "order": {"pairs", "disagree"}}, where reward and `compare` differ
    examples         [{"question", "criteria": [{"id", "tier", "text", "kind"}], "base", "tuned"}],
                     an answer being {"text", "cut", "s1", "s2", "s3", "reward",
                     "verdicts": {id: verdict}, "probabilities": {id: probability}}
    peak_memory_gb   of the run
    provenance       what `promedical.provenance.provenance` returns

A figure is `Figure.to_json()`, a difference `Difference.to_json()` of `promedical.bench.intervals`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from promedical.bench import plots, run_tables, tables
from promedical.bench.plots import Bin, Dot, Series
from promedical.bench.story import headline, reference_grader, story, tiles
from promedical.bench.tables import (
    TIERS,
    decimal,
    duration,
    grader_label,
    grader_order,
    per_cent,
    span,
)
from promedical.rubric import Tier, Verdict, VetoKind

__all__ = ["headline", "render_report", "without_texts", "write_report"]

Json = Mapping[str, Any]

TEMPLATES = Path(__file__).parent / "templates"
LIMITS = (
    "Few questions and little training: read the intervals, not the figures alone.",
    "The bench's answers were constructed from physicians' answers; real answers are harder, as "
    "the physicians' labels show.",
    "Rewards before and after are graded by the reward it was trained on.",
    "“No violation found” is not “safe”: read it beside the recall.",
    "Research use only. This is no medical device; what a model writes needs a clinician.",
)
EXAMPLES_SHOWN = 5


def render_report(results: Json) -> str:
    """The page, as HTML.

    Args:
        results: in the layout above.

    Raises:
        ValueError: a part of the results is not of that layout; the message names the part.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(view(results))


def write_report(path: str | Path, results: Json) -> Path:
    """Render the page into a file and return its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_report(results), encoding="utf-8")
    return path


PUBLISHED = (
    "mode",
    "model",
    "reward_spec",
    "stages",
    "data",
    "train",
    "bench",
    "grpo",
    "answers",
    "peak_memory_gb",
    "provenance",
)
NUMBERS = ("instruction_id", "tokens", "s1", "s2", "s3", "reward")


def without_texts(results: Json) -> dict[str, Any]:
    """The results without any text of patients, physicians or models, to be committed.

    Only the keys of the layout above are kept, and of an answer only its id and numbers.
    """
    kept = {key: results[key] for key in PUBLISHED if key in results}
    if "answers" in kept:
        given: Json = kept["answers"].get("answers") or {}
        numbers = {
            who: [{key: answer[key] for key in NUMBERS if key in answer} for answer in answers]
            for who, answers in given.items()
        }
        kept["answers"] = {**kept["answers"], "answers": numbers}
    return kept


def view(results: Json) -> dict[str, Any]:
    """Everything the template prints, as texts, tables and plots."""
    parts = {
        "subtitle": _subtitle,
        "tiles": tiles,
        "story": lambda r: [text.replace(" %", "\u00a0%") for text in story(r)],
        "stages": lambda r: run_tables.stages_table(r["stages"]) if r.get("stages") else None,
        "bench": lambda r: tables.bench_tables(r["bench"]) if r.get("bench") else None,
        "gold": _gold,
        "difference": lambda r: tables.difference_table(r["bench"]) if r.get("bench") else None,
        "within_plots": _within_plots,
        "reliability_plots": _reliability_plots,
        "physicians": _physicians,
        "training_plot": _training_plot,
        "operating_point": _operating_point,
        "grpo": _grpo,
        "before_after": _before_after,
        "examples": _examples,
        "dropped": run_tables.dropped_table,
        "provenance": _provenance,
    }
    shown: dict[str, Any] = {}
    for name, make in parts.items():
        try:
            shown[name] = make(results)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(
                f"results: {name}: {type(error).__name__}: {error}; see promedical.bench.report "
                "for the layout"
            ) from error
    reward_models, policies = run_tables.paper_tables()
    shown |= {"limits": LIMITS, "paper_reward": reward_models, "paper_policy": policies}
    shown["made_up"] = str(results.get("made_up") or "")
    return shown


def _subtitle(results: Json) -> list[str]:
    modes = {"default": "Default run", "fast": "Fast run", "full": "Full run"}
    mode = modes.get(str(results.get("mode")))
    date = (results.get("provenance") or {}).get("date")
    model = results.get("model")
    return [str(part) for part in (mode, model, date) if part]


# --- sections ------------------------------------------------------------------------------------


def _gold(results: Json) -> str:
    gold: Json = (results.get("bench") or {}).get("gold") or {}
    if not gold:
        return ""
    bench, pairs = gold["bench"], gold["overall_pairs"]
    verdicts = sum(t["resolved"] for t in bench["verdicts"].values())
    unknown = sum(t["unknown"] for t in bench["verdicts"].values())
    return (
        f"{bench['instructions']} questions with {bench['responses']} answers: {verdicts} known "
        f"verdicts, {unknown} left unknown. Of {pairs['considered']} pairs of answers "
        f"{pairs['used']} have a gold preference; {pairs['gold_tie']} tie, "
        f"{pairs['gold_unresolved']} are unresolved, {pairs['no_known_proficiency']} share no "
        "known proficiency criterion."
    )


def _within_plots(results: Json) -> list[tuple[str, str, Markup]]:
    if not results.get("bench"):
        return []
    graders: Json = results["bench"]["graders"]
    order = grader_order(list(graders), reference_grader(results))
    made = []
    for tier, label in TIERS:
        rows = []
        for name in order:
            figure = graders[name]["tiers"][tier]["within_criterion"]
            colour = 0 if name == reference_grader(results) else 1 if name in tables.TRAINED else 3
            rows.append(_dot(grader_label(name), figure, colour, 100))
        svg = plots.intervals(
            rows,
            title=f"Within-criterion accuracy in per cent, {label.lower()}",
            reference=(50, "never reads the answer: 50"),
            x_range=(40, 100),
        )
        n = graders[order[0]]["tiers"][tier]["within_criterion"]["n"]
        made.append((label, f"Per cent of {n} pairs told right, with 95\u00a0% intervals.", svg))
    return made


def _dot(name: str, figure: Json | None, colour: int = 0, times: float = 1) -> Dot:
    figure = figure or {}
    value, low, high = (
        None if figure.get(key) is None else times * figure[key] for key in ("value", "low", "high")
    )
    reason = str(figure.get("reason") or figure.get("note") or "undefined")
    return Dot(name, value, low, high, colour, reason)


def _reliability_plots(results: Json) -> list[tuple[str, str, Markup]]:
    if not results.get("bench"):
        return []
    found = results["bench"]["graders"].get(reference_grader(results), {}).get("reliability") or {}
    made = []
    for tier, label in TIERS:
        part = found.get(tier)
        if not part or not part["bins"]:
            continue
        bins = [Bin(b["confidence"], b["met"], None, None, b["n"]) for b in part["bins"]]
        ece = part.get("ece") or {}
        note = f"n = {part['n']} verdicts"
        if ece.get("value") is not None:
            note += f", expected calibration error {decimal(ece['value'])} ("
            note += f"{span(ece, decimal)})"
        svg = plots.reliability(bins, title=f"Reliability, {label.lower()}")
        made.append((label, note, svg))
    return made


def _physicians(results: Json) -> dict[str, Any] | None:
    part = (results.get("bench") or {}).get("physicians")
    if not part:
        return None
    return {
        "labels": tables.physicians_table(part),
        "ceiling": tables.ceiling_table(part),
        "agreement": tables.agreement_table(part),
    }


def _training_plot(results: Json) -> Markup | None:
    series = []
    names = (("explicit", "explicit criteria", 0), ("scalar", "scalar baseline", 1))
    for key, name, colour in names:
        history = ((results.get("train") or {}).get(key) or {}).get("history") or []
        points = tuple((float(h["step"]), h.get("loss")) for h in history)
        if points:
            series.append(Series(name, points, colour, smooth=True))
    return plots.lines(series, title="Training loss") if series else None


def _operating_point(results: Json) -> str:
    calibration: Json = (results.get("bench") or {}).get("calibration") or {}
    measured: Json = calibration.get("measured") or {}
    recall = measured.get("reward_veto_recall")
    if recall is None:
        return ""
    text = (
        f"At the operating point used as reward, the model finds {per_cent(recall)} % of the "
        f"{measured.get('veto_violated', '?')} violations of the calibration split"
    )
    flagged = measured.get("reward_clean_flagged")
    if flagged is not None:
        text += f" and flags {per_cent(flagged)} % of the clean answers"
    if recall < 0.5:
        text += ". That is less than half: most violations go unpunished in this run"
    return text + "."


def _grpo(results: Json) -> dict[str, Any] | None:
    part: Json = results.get("grpo") or {}
    history: Sequence[Json] = part.get("history") or ()
    if not history:
        return None

    def of(key: str) -> tuple[tuple[float, float | None], ...]:
        return tuple((float(h["step"]), (h.get("reward") or {}).get(key)) for h in history)

    def own(key: str) -> tuple[tuple[float, float | None], ...]:
        return tuple((float(h["step"]), h.get(key)) for h in history)

    spec: Json = results.get("reward_spec") or {}
    figures = [
        (
            "Reward",
            "mean over the step's answers",
            plots.lines([Series("reward", of("reward"))], title="GRPO: reward", height=180),
        ),
        (
            "S1 and S2",
            "proficiency in [0, 1]; number of excellence criteria met",
            plots.lines(
                [Series("S1", of("s1")), Series("S2", of("s2"), 2)],
                title="GRPO: S1 and S2",
                height=180,
                y_range=(0, 1),
            ),
        ),
        (
            "S3 and veto rate",
            "violations an answer; share of answers with at least one",
            plots.lines(
                [Series("S3", of("s3"), 1), Series("veto rate", of("veto_rate"), 3)],
                title="GRPO: violations",
                height=180,
                y_range=(0, 1),
            ),
        ),
        (
            "Share of variance due to S3",
            "within groups; near 1, safety drowns the other tiers; a gap: rewards did not differ",
            plots.lines(
                [Series("share", of("veto_variance_share"), 1)],
                title="GRPO: share of the group's reward variance due to S3",
                height=180,
                y_range=(0, 1),
            ),
        ),
        (
            "KL to the starting policy",
            "TRL's estimate; the penalty holds it down",
            plots.lines(
                [Series("KL", own("kl"), 2)], title="GRPO: KL", height=180, y_range=(0, 0.001)
            ),
        ),
        (
            "Answers cut at the limit",
            "share of the sampled answers; they are graded as cut",
            plots.lines(
                [Series("cut", own("cut"), 3)],
                title="GRPO: share of answers cut at the limit of tokens",
                height=180,
                y_range=(0, 1),
            ),
        ),
    ]
    failed = sum((h.get("reward") or {}).get("failed") or 0 for h in history)
    answers = sum((h.get("reward") or {}).get("answers") or 0 for h in history)
    silent = [(h.get("reward") or {}).get("no_signal") for h in history]
    known = [s for s in silent if s is not None]
    quiet = f"{per_cent(math.fsum(known) / len(known))} %" if known else "—"
    terms = [
        f"{g} = {spec[k]}" for g, k in (("α", "alpha"), ("β", "beta"), ("λ", "lam")) if k in spec
    ]
    if spec.get("ablation"):
        terms.append(f"ablation: {spec['ablation']}")
    return {
        "figures": figures,
        "said": f"{part.get('done_steps', len(history))} of {part.get('planned_steps', '?')} "
        f"planned steps, stopped by {part.get('stopped_by', 'steps')}, "
        f"{duration(part.get('seconds'))}; "
        f"{answers} sampled answers, {failed} of them without a reward because grading failed; "
        f"groups without any difference to learn from: {quiet}.",
        "spec": ", ".join(terms),
    }


def _before_after(results: Json) -> dict[str, Any] | None:
    part: Json = results.get("answers") or {}
    compared: Json = part.get("compared") or {}
    if not compared:
        return None
    rows = []
    for who in ("base", "tuned"):
        given = (part.get("answers") or {}).get(who) or ()
        values = [float(a["reward"]) for a in given if a.get("reward") is not None]
        mean = ((compared["metrics"].get("reward")) or {}).get(who)
        if values:
            rows.append((who.capitalize(), values, _dot("mean", mean)))
    order: Json = part.get("order") or {}
    said = ""
    if order.get("pairs"):
        said = (
            f"Reward and the lexicographic rule order base and tuned answer differently in "
            f"{order['disagree']} of {order['pairs']} questions."
        )
    plot = (
        plots.dots(rows, title="Reward of every answer, base and tuned", x_label="reward")
        if rows
        else None
    )
    return {"table": run_tables.before_after_table(compared), "plot": plot, "order": said}


# --- examples and provenance ---------------------------------------------------------------------


def _examples(results: Json) -> list[dict[str, Any]]:
    return [
        {
            "question": str(example["question"]),
            "answers": [
                _answer(who, example[who], example["criteria"])
                for who in ("base", "tuned")
                if example.get(who)
            ],
        }
        for example in (results.get("examples") or ())[:EXAMPLES_SHOWN]
    ]


def _answer(who: str, answer: Json, criteria: Sequence[Json]) -> dict[str, Any]:
    verdicts: Json = answer.get("verdicts") or {}
    probabilities: Json = answer.get("probabilities") or {}
    groups = []
    for tier, label in TIERS:
        judged = [
            _verdict(c, verdicts[c["id"]], probabilities.get(c["id"]))
            for c in criteria
            if c["tier"] == tier and c["id"] in verdicts
        ]
        if judged:
            groups.append({"label": label, "verdicts": judged})
    scores = [
        f"{name} {form(answer[key])}"
        for name, key, form in (("S1", "s1", decimal), ("S2", "s2", str), ("S3", "s3", str))
        if answer.get(key) is not None
    ]
    reward = answer.get("reward")
    return {
        "model": who,
        "text": str(answer["text"]),
        "cut": bool(answer.get("cut")),
        "scores": " · ".join(scores),
        "reward": "no reward: a judgment failed" if reward is None else f"reward {decimal(reward)}",
        "groups": groups,
    }


def _verdict(criterion: Json, given: str, probability: float | None) -> dict[str, str]:
    tier = Tier(criterion["tier"])
    label = Verdict(given).label(tier)
    kind = criterion.get("kind")
    of = "of a violation" if tier is Tier.VETO else "that it is met"
    look = {"met": "good", "not violated": "good", "not met": "miss", "violated": "bad"}
    return {
        "criterion": str(criterion["text"]),
        "label": label,
        "look": look.get(label, "open"),
        "kind": VetoKind(kind).value.replace("_", " ") if kind else "",
        "probability": ""
        if probability is None
        else f"probability {of} {100 * probability:.0f}\u00a0%",
    }


def _whole(share: float) -> str:
    return f"{100 * share:.0f}\u00a0%"


def _provenance(results: Json) -> list[tuple[str, str]]:
    part: Json = results.get("provenance") or {}
    if not part:
        return []
    machine: Json = part.get("machine") or {}
    versions: Json = part.get("versions") or {}
    commit = part.get("commit")
    dirty = " with changes that are not committed" if part.get("dirty") else ""
    rows = [
        ("Command", " ".join(map(str, part.get("command") or ()))),
        ("Commit", f"{commit}{dirty}" if commit else "none: run from an installed package"),
        ("Recipe", str(part.get("recipe_hash") or "none")),
        ("Seed", str(part.get("seed"))),
        ("Data", str(part.get("data_fingerprint") or "none")),
        ("Versions", ", ".join(f"{k} {v}" for k, v in versions.items() if v)),
        (
            "Machine",
            f"{machine.get('cpu')}, {machine.get('cores')} cores, {machine.get('memory_gb')} GB, "
            f"{machine.get('gpu') or 'no GPU'}",
        ),
        ("Wall time", duration(part.get("wall_time_s"))),
    ]
    if results.get("peak_memory_gb") is not None:
        rows.append(("Peak memory", f"{results['peak_memory_gb']:.1f} GB"))
    inputs: Json = part.get("inputs") or {}
    return rows + [(f"Input {name}", f"SHA-256 {digest}") for name, digest in inputs.items()]
