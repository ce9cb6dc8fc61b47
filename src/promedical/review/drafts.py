"""A draft rubric while a physician edits it: the operations, what was changed, what is wrong.

Section 3, step 6. A draft is a tuple of `DraftCriterion`, in the order shown. A criterion keeps its
id through every edit; what is made of others (split, merged) gets a new id and names the draft's
criteria that it comes from, so that a gold rubric can be traced back. Proficiency weights are
shares: after every operation they sum to 1 again, the others keeping their proportions,

    set ω_i = p     ω_j ← ω_j (1 − p) / (1 − ω_i)   for j ≠ i

`static/draft.js` does the same in the browser, number for number (a test runs both). `diff` tells
an edit from its echo: if a criterion is removed, the other weights grow, and nobody edited those.
Everything is a pure function. Left to others: rounds and people (`rounds`), the page.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from promedical.corpus.rubric_faults import Fault, wording_faults
from promedical.rubric import WEIGHT_TOLERANCE, Criterion, Rubric, Tier, VetoKind

__all__ = [
    "COUNTED",
    "Draft",
    "DraftCriterion",
    "DraftError",
    "Edit",
    "add",
    "apply",
    "common_scale",
    "diff",
    "edit",
    "edited",
    "find_problems",
    "follows",
    "from_json",
    "hints",
    "merge",
    "move",
    "normalised",
    "opened",
    "remove",
    "same_rubric",
    "split",
    "to_json",
    "to_rubric",
]

# What a person did; "rescaled", "replaced" and "order" only follow from it.
COUNTED = ("text", "weight", "tier", "axis", "kind", "added", "removed", "split", "merged", "moved")
FIELDS = ("id", "tier", "axis", "kind", "text", "weight", "from")
LONGEST_TEXT = 2000
MOST_CRITERIA = 100
# Faults of wording that a finished rubric may not have; the others are hints (they are heuristics).
BLOCKING = ("too_short", "too_long", "question")
_TIERS = tuple(tier.value for tier in Tier)
_KINDS = tuple(kind.value for kind in VetoKind)


class DraftError(ValueError):
    """An operation that a draft does not allow; the message names criterion and field."""


@dataclass(frozen=True)
class DraftCriterion:
    """A criterion while it is edited: its text may still be empty.

    Args:
        id: unique in the draft.
        tier: "proficiency", "excellence" or "veto".
        text: the sentence as typed so far.
        weight: share of S1 for proficiency, None in the other tiers.
        axis: optional label.
        kind: for a veto, what it forbids.
        sources: ids of the draft's criteria that it comes from; empty for one that was added.
    """

    id: str
    tier: str
    text: str
    weight: float | None = None
    axis: str | None = None
    kind: str | None = None
    sources: tuple[str, ...] = ()


Draft = tuple[DraftCriterion, ...]


@dataclass(frozen=True)
class Edit:
    """One change between two states of a rubric.

    Args:
        what: one of `COUNTED`, or "rescaled" (a weight that followed others), "replaced" (split or
            merged away), "order" (of all criteria).
        criterion: id, or "" for "order".
        before, after: the values; whole criteria as JSON where one comes or goes.
    """

    what: str
    criterion: str
    before: Any = None
    after: Any = None

    def to_json(self) -> dict[str, Any]:
        """The edit as plain JSON types."""
        return {
            "what": self.what,
            "criterion": self.criterion,
            "from": self.before,
            "to": self.after,
        }


# ---- forms ----


def opened(criteria: Iterable[Mapping[str, Any]]) -> Draft:
    """The draft as a reviewer first sees it: every criterion is its own source.

    Args:
        criteria: as in an item's content.
    """
    made = (replace(_criterion(c), sources=(c["id"],)) for c in criteria)
    return normalised(tuple(made))


def from_json(criteria: Iterable[Mapping[str, Any]]) -> Draft:
    """A draft from the `criteria` of an answer that has no problems (`find_problems`)."""
    return tuple(_criterion(c) for c in criteria)


def to_json(draft: Draft) -> list[dict[str, Any]]:
    """The `criteria` of an answer."""
    return [_as_json(c) for c in draft]


def to_rubric(draft: Draft, *, safety_only: bool = False) -> Rubric:
    """The rubric that a finished draft is.

    Raises:
        RubricError: it is not finished: an empty text, no proficiency criterion.
    """
    made = (
        Criterion(
            c.id,
            Tier(c.tier),
            " ".join(c.text.split()),
            c.weight,
            c.axis or None,
            VetoKind(c.kind) if c.kind else None,
        )
        for c in normalised(draft)
    )
    return Rubric(tuple(made), safety_only=safety_only)


def _criterion(data: Mapping[str, Any]) -> DraftCriterion:
    return DraftCriterion(
        id=data["id"],
        tier=data["tier"],
        text=data["text"],
        weight=data.get("weight"),
        axis=data.get("axis") or None,
        kind=data.get("kind") or None,
        sources=tuple(data.get("from") or ()),
    )


def _as_json(c: DraftCriterion) -> dict[str, Any]:
    return {
        "id": c.id,
        "tier": c.tier,
        "axis": c.axis,
        "kind": c.kind,
        "text": c.text,
        "weight": c.weight,
        "from": list(c.sources),
    }


# ---- operations ----


def normalised(draft: Draft) -> Draft:
    """The draft with proficiency weights that sum to 1, and no weight elsewhere.

    A criterion without a weight gets an equal part, 1/n; if no weight is positive, all are equal.
    """
    cleared = [c if c.tier == Tier.PROFICIENCY else replace(c, weight=None) for c in draft]
    mine = [c for c in cleared if c.tier == Tier.PROFICIENCY]
    size, new = len(mine), sum(c.weight is None for c in mine)
    total = _sum(c.weight for c in mine)
    # Weights that sum to 1 stay as they are: a rubric that nobody touched does not change.
    if not new and abs(total - 1) <= 1e-12:
        return tuple(cleared)

    def share(c: DraftCriterion) -> float | None:
        if c.tier != Tier.PROFICIENCY:
            return None
        if c.weight is None or total <= 0:
            return 1 / size
        return c.weight / total * ((size - new) / size)

    return tuple(replace(c, weight=share(c)) for c in cleared)


def edit(draft: Draft, id: str, **values: Any) -> Draft:
    """Set text, weight, tier, axis or kind of one criterion.

    A weight is its new share, 0 to 1; the others keep their proportions. In another tier a
    criterion loses what that tier does not have: its weight, or its kind.

    Raises:
        DraftError: no such criterion or field, or a weight out of range or place.
    """
    at = _index(draft, id)
    if unknown := sorted(set(values) - {"text", "weight", "tier", "axis", "kind"}):
        raise DraftError(f"criterion {id!r}: no field {unknown[0]!r}")
    weight = values.pop("weight", None)
    found = replace(draft[at], **values)
    if found.tier not in _TIERS:
        raise DraftError(f"criterion {id!r}: tier: found {found.tier!r}")
    if found.tier != Tier.VETO:
        found = replace(found, kind=None)
    if found.tier != Tier.PROFICIENCY:
        found = replace(found, weight=None)
    draft = normalised((*draft[:at], found, *draft[at + 1 :]))
    return draft if weight is None else _with_share(draft, at, weight)


def add(draft: Draft, tier: str, id: str, *, text: str = "", after: str | None = None) -> Draft:
    """Put a new criterion after another one, or at the end; in proficiency its share is 1/n.

    Raises:
        DraftError: an id that is there already, or no such criterion to put it after.
    """
    _check_new(draft, (id,))
    at = len(draft) if after is None else _index(draft, after) + 1
    return normalised((*draft[:at], DraftCriterion(id, tier, text), *draft[at:]))


def remove(draft: Draft, id: str) -> Draft:
    """Take a criterion out.

    Raises:
        DraftError: no such criterion.
    """
    at = _index(draft, id)
    return normalised((*draft[:at], *draft[at + 1 :]))


def split(draft: Draft, id: str, parts: Sequence[tuple[str, str]]) -> Draft:
    """Put several criteria in the place of one; they share its weight equally.

    Args:
        parts: (new id, text) of each, at least two.

    Raises:
        DraftError: fewer than two parts, an id that is there already, or no such criterion.
    """
    at = _index(draft, id)
    if len(parts) < 2:
        raise DraftError(f"criterion {id!r}: split: found {len(parts)} parts, expected two or more")
    _check_new(draft, [new for new, _ in parts])
    old = draft[at]
    weight = None if old.weight is None else old.weight / len(parts)
    made = (replace(old, id=new, text=text, weight=weight) for new, text in parts)
    return normalised((*draft[:at], *made, *draft[at + 1 :]))


def merge(draft: Draft, first: str, second: str, id: str, text: str | None = None) -> Draft:
    """Put one criterion in the place of two of a tier; it has the weight of both.

    Args:
        text: of the new one; both texts by default.

    Raises:
        DraftError: criteria of different tiers, the same twice, or an id that is there already.
    """
    a, b = draft[_index(draft, first)], draft[_index(draft, second)]
    if first == second or a.tier != b.tier:
        raise DraftError(f"criteria {first!r} and {second!r}: merge: expected two of one tier")
    _check_new(draft, (id,))
    made = replace(
        a,
        id=id,
        text=f"{a.text.rstrip()} {b.text.lstrip()}".strip() if text is None else text,
        weight=None if a.weight is None or b.weight is None else a.weight + b.weight,
        axis=a.axis if a.axis == b.axis else a.axis or b.axis,
        kind=a.kind or b.kind,
        sources=tuple(dict.fromkeys((*a.sources, *b.sources))),
    )
    return normalised(tuple(made if c.id == first else c for c in draft if c.id != second))


def move(draft: Draft, id: str, step: int) -> Draft:
    """Move a criterion past its neighbour of the same tier, up (-1) or down (+1), if there is one.

    Raises:
        DraftError: no such criterion.
    """
    at = _index(draft, id)
    span = range(at - 1, -1, -1) if step < 0 else range(at + 1, len(draft))
    for other in span:
        if draft[other].tier == draft[at].tier:
            order = list(draft)
            order[at], order[other] = order[other], order[at]
            return tuple(order)
    return draft


def _with_share(draft: Draft, at: int, share: Any) -> Draft:
    c = draft[at]
    where = f"criterion {c.id!r}: weight"
    if c.tier != Tier.PROFICIENCY:
        raise DraftError(f"{where}: found {share!r}, expected none in the tier {c.tier}")
    if not _is_number(share) or not 0 <= share <= 1:
        raise DraftError(f"{where}: found {share!r}, expected a share of 0 to 1")
    others = [i for i, other in enumerate(draft) if other.weight is not None and i != at]
    if not others:
        return draft
    rest = _sum(draft[i].weight for i in others)
    order = list(draft)
    order[at] = replace(c, weight=share)
    for i in others:
        weight = draft[i].weight or 0.0
        left = weight / rest * (1 - share) if rest > 0 else (1 - share) / len(others)
        order[i] = replace(draft[i], weight=left)
    return tuple(order)


def _index(draft: Draft, id: str) -> int:
    for at, criterion in enumerate(draft):
        if criterion.id == id:
            return at
    raise DraftError(f"criterion {id!r}: not in the draft")


def _check_new(draft: Draft, ids: Sequence[str]) -> None:
    known = {c.id for c in draft} | {source for c in draft for source in c.sources}
    for number, id in enumerate(ids):
        if not id or id in known or id in ids[:number]:
            raise DraftError(f"criterion {id!r}: the id is taken, expected a new one")


def _sum(weights: Iterable[float | None]) -> float:
    # One after the other as the browser adds, so that both get the same number.
    total = 0.0
    for weight in weights:
        total += weight or 0.0
    return total


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# ---- what was changed ----


def diff(before: Draft, after: Draft) -> tuple[Edit, ...]:
    """The edits that lead from one state to the other, in a fixed order: `apply` is its inverse.

    Field by field in the order of `before`, then what came in the order of `after`, then the order.
    """
    old, new = {c.id: c for c in before}, {c.id: c for c in after}
    kept = [id for id in old if id in new]
    came = [c for c in after if c.id not in old]
    used = {source for c in came for source in c.sources}
    scale = common_scale([(old[id].weight, new[id].weight) for id in kept])
    found: list[Edit] = []
    for id, c in old.items():
        if id not in new:
            what = "replaced" if id in used else "removed"
            found.append(Edit(what, id, _as_json(c)))
            continue
        found += _field_edits(c, new[id], scale)
    for c in came:
        what = ("added", "split")[len(c.sources)] if len(c.sources) < 2 else "merged"
        found.append(Edit(what, c.id, list(c.sources), _as_json(c)))
    found += [Edit("moved", id) for id in _moved(old, new, kept)]
    if [*kept, *(c.id for c in came)] != list(new):
        found.append(Edit("order", "", list(old), list(new)))
    return tuple(found)


def apply(before: Draft, edits: Iterable[Edit]) -> Draft:
    """The state that `diff` found these edits to lead to."""
    state = {c.id: c for c in before}
    order: list[str] | None = None
    for change in edits:
        if change.what in ("removed", "replaced"):
            del state[change.criterion]
        elif change.what in ("added", "split", "merged"):
            state[change.criterion] = _criterion(change.after)
        elif change.what == "order":
            order = change.after
        elif change.what != "moved":
            field = "weight" if change.what == "rescaled" else change.what
            c = state[change.criterion]
            state[change.criterion] = replace(c, **{field: change.after})
    return tuple(state[id] for id in (state if order is None else order))


def edited(edits: Iterable[Edit]) -> bool:
    """Whether a person changed anything."""
    return any(change.what in COUNTED for change in edits)


def same_rubric(a: Draft, b: Draft) -> bool:
    """Whether two drafts say the same, whatever their ids and order; weights to 0.1 %."""

    def content(draft: Draft) -> Counter[tuple[Any, ...]]:
        return Counter(
            (
                c.tier,
                c.axis,
                c.kind,
                " ".join(c.text.split()),
                None if c.weight is None else round(c.weight, 3),
            )
            for c in draft
        )

    return content(a) == content(b)


def _field_edits(old: DraftCriterion, new: DraftCriterion, scale: float | None) -> list[Edit]:
    found = [
        Edit(name, old.id, getattr(old, name), getattr(new, name))
        for name in ("tier", "text", "axis", "kind")
        if getattr(old, name) != getattr(new, name)
    ]
    if old.weight != new.weight:
        echo = old.weight is None or new.weight is None
        if old.weight is not None and new.weight is not None:
            echo = follows(old.weight, new.weight, scale)
        found.append(Edit("rescaled" if echo else "weight", old.id, old.weight, new.weight))
    return found


def common_scale(pairs: Sequence[tuple[float | None, float | None]]) -> float | None:
    """The factor that most weights changed by, which is re-normalisation and nobody's edit.

    None if no two of several weights agree on one: then every change is an edit.

    Args:
        pairs: (before, after).
    """
    ratios = sorted(new / old for old, new in pairs if old and new is not None)
    best, most = None, 0
    for start, ratio in enumerate(ratios):
        size = sum(math.isclose(r, ratio, rel_tol=1e-6) for r in ratios[start:])
        if size > most:
            best, most = ratio, size
    return best if most > 1 or len(ratios) == 1 else None


def follows(old: float, new: float, scale: float | None) -> bool:
    """Whether a weight changed by the common factor alone (`common_scale`)."""
    return scale is not None and math.isclose(new, old * scale, rel_tol=1e-6, abs_tol=1e-9)


def _moved(
    old: Mapping[str, DraftCriterion], new: Mapping[str, DraftCriterion], kept: Sequence[str]
) -> list[str]:
    """The fewest criteria whose moving explains the new order within each tier."""
    place = {id: at for at, id in enumerate(new)}
    moved: set[str] = set()
    for tier in _TIERS:
        ids = [id for id in kept if old[id].tier == tier == new[id].tier]
        moved |= set(ids) - _longest_rising(ids, place)
    return [id for id in kept if id in moved]


def _longest_rising(ids: Sequence[str], place: Mapping[str, int]) -> set[str]:
    best: list[list[str]] = []
    longest: list[str] = []
    for at, id in enumerate(ids):
        run: list[str] = []
        for i in range(at):
            if place[ids[i]] < place[id] and len(best[i]) > len(run):
                run = best[i]
        best.append([*run, id])
        if len(best[at]) > len(longest):
            longest = best[at]
    return set(longest)


# ---- what is wrong ----


def find_problems(
    draft: Sequence[Mapping[str, Any]], criteria: Any, *, finish: bool, safety_only: bool = False
) -> list[str]:
    """What keeps the criteria of an answer from being kept, a line each, field first.

    Args:
        draft: criteria of the item's content.
        criteria: of the answer, as it came.
        finish: whether they are to be gold: then texts, weights and tiers have to be complete, and
            sentences that were changed have to be ones that a judge can decide.
        safety_only: whether the draft has no proficiency tier on purpose.
    """
    if not isinstance(criteria, list) or len(criteria) > MOST_CRITERIA:
        return [f"criteria: expected a list of at most {MOST_CRITERIA}"]
    known = {c["id"]: c for c in draft}
    found: list[str] = []
    seen: set[str] = set()
    for number, c in enumerate(criteria):
        where = f"criteria[{number}]"
        wrong = _form_problems(where, c, known)
        if not wrong and c["id"] in seen:
            wrong = [f"{where}: id: {c['id']!r} is there twice"]
        if not wrong:
            seen.add(c["id"])
        found += wrong
    if found or not finish:
        return found
    return _finish_problems(known, from_json(criteria), safety_only)


def _form_problems(where: str, c: Any, known: Mapping[str, Any]) -> list[str]:
    if not isinstance(c, dict) or set(c) != set(FIELDS):
        return [f"{where}: expected an object with {', '.join(FIELDS)}"]
    found = []
    if not isinstance(c["id"], str) or not 0 < len(c["id"]) <= 200:
        return [f"{where}: id: expected 1 to 200 characters"]
    if c["tier"] not in _TIERS:
        found.append(f"{where}: tier: expected one of {', '.join(_TIERS)}")
    if c["kind"] is not None and (c["tier"] != Tier.VETO or c["kind"] not in _KINDS):
        found.append(f"{where}: kind: expected none, or on a veto one of {', '.join(_KINDS)}")
    if c["axis"] is not None and (not isinstance(c["axis"], str) or len(c["axis"]) > 100):
        found.append(f"{where}: axis: expected none or at most 100 characters")
    if not isinstance(c["text"], str) or len(c["text"]) > LONGEST_TEXT:
        found.append(f"{where}: text: expected at most {LONGEST_TEXT} characters")
    if (c["tier"] == Tier.PROFICIENCY) != (c["weight"] is not None):
        found.append(f"{where}: weight: expected one in proficiency and none in other tiers")
    elif c["weight"] is not None and not (_is_number(c["weight"]) and 0 <= c["weight"] <= 1):
        found.append(f"{where}: weight: expected a share of 0 to 1")
    sources = c["from"]
    if not isinstance(sources, list) or not all(isinstance(s, str) for s in sources):
        found.append(f"{where}: from: expected a list of ids")
    elif not set(sources) <= set(known) or len(set(sources)) != len(sources):
        found.append(f"{where}: from: expected ids of the draft, each once")
    elif c["id"] in known and sources != [c["id"]]:
        found.append(f"{where}: from: expected its own id, which is the draft's")
    return found


def _finish_problems(
    known: Mapping[str, Mapping[str, Any]], criteria: Draft, safety_only: bool
) -> list[str]:
    found = []
    for number, c in enumerate(criteria):
        where = f"criteria[{number}]"
        if not c.text.strip():
            found.append(f"{where}: text: is empty, expected a sentence")
        elif c.id not in known or c.text != known[c.id]["text"]:
            # What the draft already said is judged by the reviewer, not by a heuristic.
            found += [str(f) for f in wording_faults(where, c.text) if f.code in BLOCKING]
    weights = [c.weight for c in criteria if c.weight is not None]
    if not weights and not safety_only:
        found.append("criteria: expected at least one in the tier of proficiency")
    if weights and abs(_sum(weights) - 1) > WEIGHT_TOLERANCE:
        found.append(f"criteria: the weights sum to {_sum(weights):.6g}, expected 1")
    return found


def hints(text: str) -> list[Fault]:
    """What may keep a judge from deciding a sentence; heuristics, for the writer to consider."""
    return wording_faults("text", text) if text.strip() else []
