/* A draft rubric while it is edited: promedical/review/drafts.py in the browser, number for number.
 *
 * A draft is a list of criteria as in an answer: {id, tier, axis, kind, text, weight, from}. Every
 * function gives a new list and leaves the old one alone, so that a state can be kept for "undo".
 * After every operation the proficiency weights sum to 1. `diff` tells what a person did from what
 * re-normalisation did. A test runs both languages on the same operations. No page here: `rubric.js`.
 */
"use strict";

(() => {
  const Review = (window.Review = window.Review || {});
  const TIERS = ["proficiency", "excellence", "veto"];
  const COUNTED = [
    "text", "weight", "tier", "axis", "kind", "added", "removed", "split", "merged", "moved",
  ];

  const sum = (weights) => {
    let total = 0;
    for (const weight of weights) total += weight || 0;
    return total;
  };
  const close = (a, b, relative, absolute = 0) =>
    a === b || Math.abs(a - b) <= Math.max(relative * Math.max(Math.abs(a), Math.abs(b)), absolute);

  const opened = (criteria) =>
    normalised(
      criteria.map((c) => ({
        id: c.id,
        tier: c.tier,
        axis: c.axis || null,
        kind: c.kind || null,
        text: c.text,
        weight: c.weight ?? null,
        from: [c.id],
      })),
    );

  const normalised = (draft) => {
    const cleared = draft.map((c) => (c.tier === "proficiency" ? c : { ...c, weight: null }));
    const mine = cleared.filter((c) => c.tier === "proficiency");
    const size = mine.length;
    const fresh = mine.filter((c) => c.weight === null).length;
    const total = sum(mine.map((c) => c.weight));
    if (!fresh && Math.abs(total - 1) <= 1e-12) return cleared;
    const share = (c) => {
      if (c.tier !== "proficiency") return null;
      if (c.weight === null || total <= 0) return 1 / size;
      return (c.weight / total) * ((size - fresh) / size);
    };
    return cleared.map((c) => ({ ...c, weight: share(c) }));
  };

  const index = (draft, id) => {
    const at = draft.findIndex((c) => c.id === id);
    if (at < 0) throw new RangeError(`criterion ${id}: not in the draft`);
    return at;
  };

  /* values: text, tier, axis, kind, weight (its new share; the others keep their proportions). */
  const edit = (draft, id, { weight = null, ...values }) => {
    const at = index(draft, id);
    const found = { ...draft[at], ...values };
    if (found.tier !== "veto") found.kind = null;
    if (found.tier !== "proficiency") found.weight = null;
    const next = normalised(draft.map((c, i) => (i === at ? found : c)));
    return weight === null ? next : withShare(next, at, weight);
  };

  const withShare = (draft, at, share) => {
    if (draft[at].tier !== "proficiency" || !(share >= 0 && share <= 1)) {
      throw new RangeError(`criterion ${draft[at].id}: weight ${share}`);
    }
    const others = draft.filter((c, i) => c.weight !== null && i !== at);
    if (!others.length) return draft;
    const rest = sum(others.map((c) => c.weight));
    return draft.map((c, i) => {
      if (i === at) return { ...c, weight: share };
      if (c.weight === null) return c;
      const weight = rest > 0 ? (c.weight / rest) * (1 - share) : (1 - share) / others.length;
      return { ...c, weight };
    });
  };

  const add = (draft, tier, id, { text = "", after = null } = {}) => {
    const at = after === null ? draft.length : index(draft, after) + 1;
    const made = { id, tier, axis: null, kind: null, text, weight: null, from: [] };
    return normalised([...draft.slice(0, at), made, ...draft.slice(at)]);
  };

  const remove = (draft, id) => {
    const at = index(draft, id);
    return normalised(draft.filter((_, i) => i !== at));
  };

  /* parts: [[new id, text], …], at least two. */
  const split = (draft, id, parts) => {
    const at = index(draft, id);
    const weight = draft[at].weight === null ? null : draft[at].weight / parts.length;
    const made = parts.map(([part, text]) => ({ ...draft[at], id: part, text, weight }));
    return normalised([...draft.slice(0, at), ...made, ...draft.slice(at + 1)]);
  };

  const merge = (draft, first, second, id, text = null) => {
    const a = draft[index(draft, first)];
    const b = draft[index(draft, second)];
    if (first === second || a.tier !== b.tier) throw new RangeError("merge: two of one tier");
    const made = {
      ...a,
      id,
      text: text ?? `${a.text.trimEnd()} ${b.text.trimStart()}`.trim(),
      weight: a.weight === null || b.weight === null ? null : a.weight + b.weight,
      axis: a.axis === b.axis ? a.axis : a.axis || b.axis,
      kind: a.kind || b.kind,
      from: [...new Set([...a.from, ...b.from])],
    };
    return normalised(draft.filter((c) => c.id !== second).map((c) => (c.id === first ? made : c)));
  };

  /* Past the neighbour of the same tier, up (-1) or down (+1). */
  const move = (draft, id, step) => {
    const at = index(draft, id);
    for (let i = at + step; i >= 0 && i < draft.length; i += step) {
      if (draft[i].tier !== draft[at].tier) continue;
      const order = [...draft];
      [order[at], order[i]] = [order[i], order[at]];
      return order;
    }
    return draft;
  };

  /* [{what, criterion, from, to}] as drafts.diff gives them. */
  const diff = (before, after) => {
    const old = new Map(before.map((c) => [c.id, c]));
    const now = new Map(after.map((c) => [c.id, c]));
    const kept = [...old.keys()].filter((id) => now.has(id));
    const came = after.filter((c) => !old.has(c.id));
    const used = new Set(came.flatMap((c) => c.from));
    const scale = commonScale(kept.map((id) => [old.get(id), now.get(id)]));
    const entry = (what, criterion, from = null, to = null) => ({ what, criterion, from, to });
    const found = [];
    for (const [id, c] of old) {
      if (!now.has(id)) found.push(entry(used.has(id) ? "replaced" : "removed", id, c));
      else found.push(...fieldEdits(c, now.get(id), scale, entry));
    }
    for (const c of came) {
      const what = c.from.length < 2 ? ["added", "split"][c.from.length] : "merged";
      found.push(entry(what, c.id, c.from, c));
    }
    for (const id of moved(old, now, kept)) found.push(entry("moved", id));
    const natural = [...kept, ...came.map((c) => c.id)];
    if (!Review.same(natural, [...now.keys()])) {
      found.push(entry("order", "", [...old.keys()], [...now.keys()]));
    }
    return found;
  };

  const fieldEdits = (old, now, scale, entry) => {
    const found = ["tier", "text", "axis", "kind"]
      .filter((name) => old[name] !== now[name])
      .map((name) => entry(name, old.id, old[name], now[name]));
    if (old.weight !== now.weight) {
      let echo = old.weight === null || now.weight === null;
      if (!echo && scale !== null) echo = close(now.weight, old.weight * scale, 1e-6, 1e-9);
      found.push(entry(echo ? "rescaled" : "weight", old.id, old.weight, now.weight));
    }
    return found;
  };

  const commonScale = (pairs) => {
    const ratios = pairs
      .filter(([old, now]) => old.weight && now.weight !== null)
      .map(([old, now]) => now.weight / old.weight)
      .sort((a, b) => a - b);
    let best = null;
    let most = 0;
    ratios.forEach((ratio, start) => {
      const size = ratios.slice(start).filter((r) => close(r, ratio, 1e-6)).length;
      if (size > most) [best, most] = [ratio, size];
    });
    return most > 1 || ratios.length === 1 ? best : null;
  };

  const moved = (old, now, kept) => {
    const place = new Map([...now.keys()].map((id, at) => [id, at]));
    const found = new Set();
    for (const tier of TIERS) {
      const ids = kept.filter((id) => old.get(id).tier === tier && now.get(id).tier === tier);
      const stay = longestRising(ids, place);
      for (const id of ids) if (!stay.has(id)) found.add(id);
    }
    return kept.filter((id) => found.has(id));
  };

  const longestRising = (ids, place) => {
    const best = [];
    let longest = [];
    ids.forEach((id, at) => {
      let run = [];
      for (let i = 0; i < at; i++) {
        if (place.get(ids[i]) < place.get(id) && best[i].length > run.length) run = best[i];
      }
      best.push([...run, id]);
      if (best[at].length > longest.length) longest = best[at];
    });
    return new Set(longest);
  };

  const counted = (edits) => edits.filter((e) => COUNTED.includes(e.what));

  Review.draft = {
    TIERS, opened, normalised, edit, add, remove, split, merge, move, diff, counted,
  };
})();
