"""De-duplication at the size of the paper's corpus: what is found, what is lost, time and memory.

    python benchmarks/dedup.py --data instructions.jsonl.gz                # 823,703 rows
    python benchmarks/dedup.py --data … --rows 50000 --half tune           # while tuning
    python benchmarks/dedup.py --data … --dry-run                          # count the rows only

The file holds one JSON object a line with `id`, `source` and `text` ($INSTRUCTIONS names it too).
Its questions (`base`) are joined by edits of them (`dedup_edits`): every applicable change of
meaning once, every applicable way of writing the same once, then further combinations of the latter
until there are enough. A question, its edits and its exact copies are a family; families are cut
in two by a hash of the normalised text. Settings were chosen on the half "tune" alone; results are
given for both, "report" is the one that counts. Rows are shuffled, so that an edit may come first.

found   of the rows that keep the meaning, the share that ends in the same kept row as its question
lost    of the rows that change it, the share that ends in a kept row of another meaning: with its
        question, or with anything else; a change that happens to give a text that is there already
        is left out of both
base    of the distinct questions themselves, the share that ends with another one. Which of them
        really are one question is unknown, so this is an upper bound. For MedQuAD something is
        known: two questions of one collection are on two topics or on two aspects of a topic.

Compared with plain SemHash (raw text, the same encoder, its default threshold) and MinHash LSH
(datasketch, character 5-grams of the normalised text), both on `--peer-rows` rows of whole
families, as are then our own figures beside theirs. Every system runs in a process of its own; its
peak memory, sampled twice a second, includes the rows. The result holds figures only, no text.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import json
import os
import random
import re
import sys
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil

from promedical.corpus.dedup import DedupSettings, dedup
from promedical.corpus.meaning_guard import facts
from promedical.corpus.overlap import normalise
from promedical.provenance import provenance
from promedical.records import GradedInstruction, Message

sys.path.insert(0, str(Path(__file__).parent))
from dedup_edits import KEEP, changes, mine

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "dedup.json"
ROWS = 823_703
TARGETS = {
    "found at least": 0.95,
    "lost at most": 0.005,
    "minutes at most": 12.0,
    "memory at most, GB": 6.0,
}
SEMHASH_THRESHOLD = 0.9  # its default
MINHASH = {"threshold": 0.7, "num_perm": 128, "ngram": 5}


@dataclass(frozen=True)
class Row:
    """A row and what is known about it.

    Args:
        edit: "" for a question of the file.
        keeps: whether it asks what the question of its family asks.
        coincides: its text, normalised, is also that of a row of another meaning.
    """

    id: str
    text: str
    source: str
    family: int
    edit: str
    keeps: bool
    half: str
    coincides: bool = False


# --- rows -----------------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open() as file:
        return [json.loads(line) for line in file]


def half_of(plain: str) -> str:
    return "tune" if hashlib.sha256(plain.encode()).digest()[0] % 2 else "report"


def make_rows(records: Sequence[Mapping[str, str]], rows: int, full: int, seed: int) -> list[Row]:
    """Questions and their edits, shuffled; fewer rows take fewer whole families.

    Args:
        rows: how many in all.
        full: how many there would be with every question of the file.
    """
    texts = [r["text"] for r in records]
    mined = mine(texts)
    families: dict[str, list[int]] = defaultdict(list)
    for i, text in enumerate(texts):
        families[normalise(text)].append(i)
    chosen = sorted(families, key=lambda plain: hashlib.sha256(f"{seed}{plain}".encode()).digest())
    wanted = round(rows * len(texts) / full)
    out: list[Row] = []
    used: list[tuple[int, str]] = []
    for number, plain in enumerate(chosen):
        if len(out) >= wanted:
            break
        used.append((number, plain))
        for i in families[plain]:
            source = f"{records[i]['source']}|{records[i]['id']}"
            out.append(Row(f"b{i}", texts[i], source, number, "", True, half_of(plain)))
    out += _edited(used, {p: texts[families[p][0]] for _, p in used}, mined, rows - len(out), seed)
    out = _marked(out)
    return sorted(out, key=lambda r: zlib.crc32(f"{seed} {r.id}".encode()))


def _edited(
    used: Sequence[tuple[int, str]], texts: Mapping[str, str], mined: Any, count: int, seed: int
) -> list[Row]:
    out: list[Row] = []

    def add(number: int, plain: str, name: str, edit: Callable[..., Any], copy: int) -> None:
        new = edit(texts[plain], random.Random(f"{seed} {plain} {name} {copy}"))
        keeps = name in KEEP
        if new is None or (not keeps and normalise(new) == plain):
            return
        half = half_of(plain)
        out.append(Row(f"e{number}-{name}-{copy}", new, "", number, name, keeps, half))

    # Round by round, so that a count that is reached early is short of the last round only.
    for name, edit in [*changes(mined).items(), *KEEP.items()]:
        for number, plain in used:
            add(number, plain, name, edit, 0)
    for copy in range(1, 100):
        for name in ("combined", "typo", "paraphrase"):
            for number, plain in used:
                if len(out) >= count:
                    break
                add(number, plain, name, KEEP[name], copy)
    return sorted(out, key=lambda r: zlib.crc32(r.id.encode()))[: max(0, count)]


def _marked(rows: Sequence[Row]) -> list[Row]:
    """Rows with `coincides` set where two meanings came to have one text."""
    meanings: dict[str, set[tuple[int, str]]] = defaultdict(set)
    plains = [normalise(r.text) for r in rows]
    for row, plain in zip(rows, plains, strict=True):
        meanings[plain].add((row.family, "" if row.keeps else row.edit))
    return [
        row if len(meanings[plain]) == 1 else Row(**asdict(row) | {"coincides": True})
        for row, plain in zip(rows, plains, strict=True)
    ]


# --- systems: each gives row id → id of the kept row it ends in -----------------------------------


def ours(rows: Sequence[Row], settings: DedupSettings) -> tuple[dict[str, str], dict[str, Any]]:
    last = [""]

    def say(what: str, done: int, total: int) -> None:
        if what != last[0]:
            last[0] = what
            took = sum(os.times()[:4])
            print(f"    {time.strftime('%X')} {what} (CPU {took:.0f} s)", flush=True)

    result = dedup(
        [GradedInstruction(r.id, (Message("user", r.text),), "x", "x") for r in rows],
        settings,
        progress=say,
    )
    return {d.id: d.detail["duplicate_of"] for d in result.dropped}, result.summary()


def semhash(rows: Sequence[Row], settings: DedupSettings) -> tuple[dict[str, str], dict[str, Any]]:
    from semhash import SemHash

    from promedical.demo.models import resolve_encoder

    records = [{"id": r.id, "text": r.text} for r in rows]
    index = SemHash.from_records(records, columns=["text"], model=resolve_encoder())
    result = index.self_deduplicate(threshold=SEMHASH_THRESHOLD)
    found = {d.record["id"]: d.duplicate_of["id"] for d in result.filtered}
    return found, {"dropped": len(found), "threshold": SEMHASH_THRESHOLD}


def minhash(rows: Sequence[Row], settings: DedupSettings) -> tuple[dict[str, str], dict[str, Any]]:
    from datasketch import MinHash, MinHashLSH

    size = int(MINHASH["ngram"])
    lsh = MinHashLSH(threshold=MINHASH["threshold"], num_perm=int(MINHASH["num_perm"]))
    found: dict[str, str] = {}
    for row in rows:
        plain = normalise(row.text)
        sketch = MinHash(num_perm=int(MINHASH["num_perm"]))
        sketch.update_batch(
            [plain[i : i + size].encode() for i in range(max(1, len(plain) - size + 1))]
        )
        # Only kept rows are in the index; the most alike one over the threshold is taken.
        alike = [(sketch.jaccard(kept), id) for id in lsh.query(sketch) for kept in [SKETCHES[id]]]
        best = max(alike, default=(0.0, ""))
        if best[0] >= MINHASH["threshold"]:
            found[row.id] = best[1]
        else:
            lsh.insert(row.id, sketch)
            SKETCHES[row.id] = sketch
    return found, {"dropped": len(found), **MINHASH}


SKETCHES: dict[str, Any] = {}
System = Callable[[Sequence[Row], DedupSettings], tuple[dict[str, str], dict[str, Any]]]
SYSTEMS: dict[str, System] = {
    "guarded": ours,
    "unguarded": ours,
    "semhash": semhash,
    "minhash": minhash,
}


def run(name: str, rows: Sequence[Row], settings: DedupSettings) -> dict[str, Any]:
    """One system in a process of its own: what it found, its time and its memory."""
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    if name == "unguarded":
        settings = DedupSettings(**asdict(settings) | {"guard": False})

    def child() -> None:
        before = os.times()
        started = time.perf_counter()
        found, counts = SYSTEMS[name](rows, settings)
        took = time.perf_counter() - started
        after = os.times()
        cost = {
            "rows": len(rows),
            "minutes": took / 60,
            "cpu_minutes": (sum(after[:4]) - sum(before[:4])) / 60,
        }
        sender.send((found, {"cost": cost, "counts": counts}))
        sender.close()

    process = context.Process(target=child)
    process.start()
    sender.close()
    peak = 0.0
    try:
        while not receiver.poll(0.5):
            peak = max(peak, resident_gb())
        found, out = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{name}: its process ended with {process.exitcode}") from None
    process.join()
    out["cost"]["memory_gb"] = peak
    print(f"{name}: {out['cost']['minutes']:.1f} min on {len(rows)} rows", flush=True)
    out |= {half: evaluate(rows, found, half) for half in ("tune", "report")}
    return dict(out)


def resident_gb() -> float:
    """Memory of this process and all below it, a page that several share counted once (PSS)."""
    total = 0
    mine = psutil.Process()
    for process in (mine, *mine.children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # it may end while it is looked at
            memory = process.memory_full_info()
            total += getattr(memory, "pss", memory.uss)  # Linux alone has PSS
    return total / 1e9


# --- what was found and lost ----------------------------------------------------------------------


def evaluate(rows: Sequence[Row], found: Mapping[str, str], half: str) -> dict[str, Any]:
    """Shares found and lost by edit for the families of one half."""
    by_id = {r.id: r for r in rows}
    root = {r.id: found.get(r.id, r.id) for r in rows}
    bases: dict[int, str] = {}
    for row in rows:
        if not row.edit:
            bases[row.family] = root[row.id]
    kept: dict[str, Counter[str]] = defaultdict(Counter)
    lost: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        if row.half != half or row.coincides or not row.edit:
            continue
        end = by_id[root[row.id]]
        if row.keeps:
            kept[row.edit].update(rows=1, found=root[row.id] == bases[row.family])
            continue
        with_base = root[row.id] == bases[row.family]
        own = end.family == row.family and end.edit == row.edit
        lost[row.edit].update(rows=1, with_question=with_base, elsewhere=not (with_base or own))
    return {
        "found": _shares(kept, ("found",)),
        "lost": _shares(lost, ("with_question", "elsewhere")),
        "base": _base(rows, root, half),
    }


def _shares(counts: Mapping[str, Counter[str]], names: Sequence[str]) -> dict[str, Any]:
    total = sum(counts.values(), Counter())
    return {
        edit: {"rows": c["rows"], "share": sum(c[n] for n in names) / max(1, c["rows"])}
        | {n: c[n] for n in names}
        for edit, c in [("all", total), *sorted(counts.items())]
    }


def _base(rows: Sequence[Row], root: Mapping[str, str], half: str) -> dict[str, Any]:
    """Distinct questions of the file that end with another one."""
    groups: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        if not row.edit:
            groups[root[row.id]].setdefault(row.family, row)
    counts: Counter[str] = Counter()
    for group in groups.values():
        members = list(group.values())
        for i, row in enumerate(members):
            if row.half != half:
                continue
            known = collection(row)
            counts.update(
                distinct=1,
                merged=i > 0,
                medquad=bool(known),
                medquad_lost=bool(known) and any(collection(m) == known for m in members[:i]),
            )
    return {
        **counts,
        "merged_share": counts["merged"] / max(1, counts["distinct"]),
        "medquad_lost_share": counts["medquad_lost"] / max(1, counts["medquad"]),
    }


def collection(row: Row) -> str:
    """The MedQuAD collection of a question, "" for other sources."""
    source, _, id = row.source.partition("|")
    return id.partition(":")[0] if source == "medquad" else ""


def known_drugs(rows: Sequence[Row]) -> float:
    """Of the rows whose drug was exchanged, the share whose new name is in the guard's list."""
    words: Counter[str] = Counter()
    originals = {r.family: r.text for r in rows if not r.edit}
    for row in rows:
        if row.edit == "drug":
            new = set(re.findall(r"\w+", row.text.lower()))
            new -= set(re.findall(r"\w+", originals[row.family].lower()))
            listed = any(facts(word).words != (word,) or word in DRUGS() for word in new)
            words.update(rows=1, known=listed)
    return words["known"] / max(1, words["rows"])


def DRUGS() -> set[str]:
    from promedical.corpus.meaning_guard import _words

    return {w for w, reason in _words().reasons.items() if reason == "drug"}


# --- the run --------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("INSTRUCTIONS"))
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--peer-rows", type=int, default=100_000, help="0: all of them")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--half", choices=("tune", "report"), help="print this one; keep nothing")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="of dedup")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry-run", action="store_true", help="make and count the rows only")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(argv)
    if options.data is None:
        parser.error("--data: found none, expected a file (or $INSTRUCTIONS)")
    return options


def subset(rows: Sequence[Row], count: int) -> list[Row]:
    """Whole families, about so many rows."""
    families = len({r.family for r in rows})
    return [r for r in rows if r.family < families * count / len(rows)]


def settings_of(options: argparse.Namespace) -> DedupSettings:
    plain = asdict(DedupSettings(workers=options.workers))
    for item in options.set:
        name, _, value = item.partition("=")
        plain[name] = type(plain[name])(json.loads(value))
    return DedupSettings(**plain)


def count(rows: Sequence[Row]) -> dict[str, Any]:
    edits = Counter(r.edit or "base" for r in rows)
    return {
        "rows": len(rows),
        "families": len({r.family for r in rows}),
        "coincide": sum(r.coincides for r in rows),
        "by_edit": dict(edits.most_common()),
        "drugs_known_to_the_guard": known_drugs(rows),
    }


def main(argv: Sequence[str] | None = None) -> int:
    options, started = parse(argv), time.perf_counter()
    records = read(Path(options.data))
    rows = make_rows(records, options.rows, ROWS, options.seed)
    counts = count(rows)
    print(json.dumps(counts, indent=1), flush=True)
    if options.dry_run:
        return 0
    settings = settings_of(options)
    small = rows if not options.peer_rows else subset(rows, options.peer_rows)
    if options.half:
        shown = [run(name, rows, settings) for name in options.systems]
        both = [{k: v for k, v in r.items() if k not in ("tune", "report")} for r in shown]
        for r, b in zip(shown, both, strict=True):
            print(json.dumps(b | {options.half: r[options.half]}, indent=1))
        return 0
    result: dict[str, Any] = {"settings": asdict(settings), "targets": TARGETS, "made": counts}
    # On all rows the one that is meant for it; on the smaller number all, side by side.
    result["systems"] = {n: run(n, rows, settings) for n in options.systems if n == "guarded"}
    result["side_by_side"] = {
        name: result["systems"][name]
        if len(small) == len(rows) and name in result["systems"]
        else run(name, small, settings)
        for name in options.systems
    }
    digest = hashlib.sha256(Path(options.data).read_bytes()).hexdigest()
    result["data"] = {
        "file": f"$INSTRUCTIONS/{Path(options.data).name}",
        "sha256": digest,
        "rows": len(records),
        "sources": len({r["source"] for r in records}),
    }
    if "guarded" in result["systems"]:
        best = result["systems"]["guarded"]
        result["reached"] = {
            "found at least": best["report"]["found"]["all"]["share"],
            "lost at most": best["report"]["lost"]["all"]["share"],
            "minutes at most": best["cost"]["minutes"],
            "memory at most, GB": best["cost"]["memory_gb"],
        }
        print(json.dumps({"targets": TARGETS, "reached": result["reached"]}, indent=1))
    packages = ("semhash", "vicinity", "usearch", "datasketch")
    result["peer_versions"] = {name: _version(name) for name in packages}
    result["provenance"] = provenance(
        seed=options.seed, recipe=asdict(settings), data_fingerprint=digest, started=started
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return 0


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
