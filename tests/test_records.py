"""Rows on disk: what is written comes back, and what is broken says where and why."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from promedical import Criterion, Rubric, Tier, Verdict, VetoKind
from promedical import records as module
from promedical.records import (
    GradedInstruction,
    Message,
    RecordError,
    Response,
    fingerprint,
    from_dict,
    read_dataset,
    read_jsonl,
    read_manifest,
    to_dict,
    write_dataset,
)

RUBRIC = Rubric(
    (
        Criterion("dose", Tier.PROFICIENCY, "States the daily limit.", weight=1, axis="accuracy"),
        Criterion("kind", Tier.EXCELLENCE, "Is kind."),
        Criterion("harm", Tier.VETO, "Advises more.", kind=VetoKind.HARMFUL_ADVICE),
    )
)
ROW = GradedInstruction(
    id="q1",
    messages=(Message("user", "May I take both?"),),
    source="made up",
    licence="CC0-1.0",
    rubric=RUBRIC,
    responses=(
        Response(
            "a",
            "constructed",
            "Yes, but no more than four a day.",
            verdicts={"dose": Verdict.MET, "kind": Verdict.ABSTAIN, "harm": Verdict.UNMET},
            votes={"dose": ("Entailment", "Neutral")},
            construction=("replaced:kind",),
        ),
        Response("b", "physician", ""),
    ),
    reference="Yes.",
    difficulty=5,
)

# --- round trips ---------------------------------------------------------------------------------

# Any text that UTF-8 can hold: other scripts, controls, newlines, but no half of a surrogate pair.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
names = texts.filter(bool)
optional_texts = st.none() | texts


@st.composite
def rubrics(draw: st.DrawFn) -> Rubric:
    ids = draw(st.lists(names, min_size=1, max_size=5, unique=True))
    split = draw(st.integers(0, len(ids)))
    parts = draw(st.lists(st.integers(1, 9), min_size=split, max_size=split))
    sentences = texts.filter(str.strip)
    criteria = [
        Criterion(
            i, Tier.PROFICIENCY, draw(sentences), weight=p / sum(parts), axis=draw(optional_texts)
        )
        for i, p in zip(ids, parts, strict=False)
    ]
    for i in ids[split:]:
        kind = draw(st.none() | st.sampled_from(list(VetoKind)))
        tier = Tier.VETO if kind else draw(st.sampled_from([Tier.VETO, Tier.EXCELLENCE]))
        criteria.append(Criterion(i, tier, draw(sentences), kind=kind))
    return Rubric(tuple(draw(st.permutations(criteria))), safety_only=split == 0)


@st.composite
def rows(draw: st.DrawFn, row_id: str = "q1") -> GradedInstruction:
    rubric = draw(st.none() | rubrics())
    ids = [] if rubric is None else [c.id for c in rubric.criteria]
    some = st.dictionaries(st.sampled_from(ids), st.sampled_from(list(Verdict))) if ids else None
    votes = st.dictionaries(st.sampled_from(ids), st.lists(texts, max_size=3)) if ids else None
    responses = tuple(
        Response(
            name,
            draw(names),
            draw(texts),
            verdicts={} if some is None else draw(some),
            votes={} if votes is None else {k: tuple(v) for k, v in draw(votes).items()},
            construction=tuple(draw(st.lists(texts, max_size=2))),
        )
        for name in draw(st.lists(names, max_size=2, unique=True))
    )
    return GradedInstruction(
        id=row_id,
        messages=(
            *draw(st.lists(st.builds(Message, st.sampled_from(module.ROLES), texts), max_size=2)),
            Message("user", draw(texts)),
        ),
        source=draw(names),
        licence=draw(names),
        rubric=rubric,
        responses=responses,
        reference=draw(optional_texts),
        category=draw(optional_texts),
        specialty=draw(optional_texts),
        difficulty=draw(st.none() | st.integers(0, 10) | st.floats(0, 10)),
    )


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    max_examples=40,
)
@given(data=st.data())
def test_a_dataset_comes_back_as_it_was_written(data: st.DataObject, tmp_path: Path) -> None:
    written = [data.draw(rows(f"q{i}")) for i in range(data.draw(st.integers(0, 2)))]
    digest = write_dataset(tmp_path / "set", written, recipe={"seed": 3}, parents=["abc"])
    read = read_dataset(tmp_path / "set")
    assert read == written
    assert digest == fingerprint(read) == fingerprint(written)


@settings(max_examples=60)
@given(rows())
def test_a_row_survives_json(row: GradedInstruction) -> None:
    assert from_dict(json.loads(json.dumps(to_dict(row)))) == row


def test_the_manifest_says_what_is_in_it(tmp_path: Path) -> None:
    other = replace(ROW, id="q2", responses=(), licence="MIT")
    digest = write_dataset(tmp_path / "set", [ROW, other], recipe={"seed": 3}, parents=["abc"])
    assert read_manifest(tmp_path / "set") == {
        "schema_version": 1,
        "fingerprint": digest,
        "recipe": {"seed": 3},
        "parents": ["abc"],
        "counts": {"instructions": 2, "responses": 2, "verdicts": 3},
        "licences": {"CC0-1.0": 1, "MIT": 1},
    }


def test_the_datasets_library_reads_the_parquet(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", [ROW, replace(ROW, id="q2", rubric=None, responses=())])
    table = datasets.Dataset.from_parquet(
        str(tmp_path / "set" / "rows.parquet"), cache_dir=str(tmp_path / "cache")
    )
    assert table["id"] == ["q1", "q2"]
    assert from_dict(table[0]) == ROW
    assert table[1]["rubric"] is None


def test_verdicts_in_json_lines_may_be_a_plain_object(tmp_path: Path) -> None:
    data = to_dict(ROW)
    data["responses"][0]["verdicts"] = {"dose": "met", "kind": "abstain", "harm": "unmet"}
    path = tmp_path / "rows.jsonl"
    path.write_text(f"\n{json.dumps(data)}\n\n{json.dumps(to_dict(replace(ROW, id='q2')))}")
    assert read_jsonl(path) == [ROW, replace(ROW, id="q2")]


def test_the_fingerprint_is_of_the_content() -> None:
    assert fingerprint([ROW]) != fingerprint([replace(ROW, reference="No.")])
    assert fingerprint([ROW, replace(ROW, id="q2")]) != fingerprint([replace(ROW, id="q2"), ROW])
    # The weight 1 and the weight 1.0 that Parquet gives back are the same content.
    assert fingerprint([ROW]) == fingerprint([replace(ROW, difficulty=5.0)])


# --- replacing -----------------------------------------------------------------------------------


def test_a_dataset_is_replaced_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    write_dataset(tmp_path / "deep" / "set", [ROW])
    write_dataset(tmp_path / "deep" / "set", [replace(ROW, id="q2")])
    assert [r.id for r in read_dataset(tmp_path / "deep" / "set")] == ["q2"]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["set"]


@pytest.mark.parametrize("stage", ["write_table", "replace", "replace_second"])
def test_a_failure_leaves_the_old_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    write_dataset(tmp_path / "set", [ROW])
    calls = []
    real = module.os.replace

    def fail(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if stage == "replace_second" and len(calls) != 2:
            real(*args)
            return
        raise KeyboardInterrupt

    target = (module.pq, "write_table") if stage == "write_table" else (module.os, "replace")
    with monkeypatch.context() as patch:
        patch.setattr(*target, fail)
        with pytest.raises(KeyboardInterrupt):
            write_dataset(tmp_path / "set", [replace(ROW, id="q2")])
    assert read_dataset(tmp_path / "set") == [ROW]
    assert len(calls) >= 1
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_a_folder_that_is_no_dataset_is_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter1.tex").write_text("…")
    for target in (precious, precious / "chapter1.tex"):
        with pytest.raises(RecordError, match=r"thesis.*is no dataset"):
            write_dataset(target, [ROW])
    assert (precious / "chapter1.tex").read_text() == "…"


def test_two_rows_with_one_id_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"set: id 'q1' repeats"):
        write_dataset(tmp_path / "set", [ROW, ROW])
    assert list(tmp_path.iterdir()) == []


def test_half_a_surrogate_pair_is_named_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"'q1': not valid Unicode"):
        write_dataset(tmp_path / "set", [replace(ROW, reference="\ud800")])
    assert list(tmp_path.iterdir()) == []


# --- bad files -----------------------------------------------------------------------------------


def broken(folder: Path, change: Callable[[Path], object]) -> str:
    """What `read_dataset` says after the files were changed."""
    write_dataset(folder, [ROW, replace(ROW, id="q2")])
    change(folder)
    with pytest.raises(RecordError) as caught:
        read_dataset(folder)
    return str(caught.value)


def tamper(folder: Path, field: str, value: Any, schema: pa.Schema | None = None) -> None:
    table = pq.read_table(folder / "rows.parquet").to_pylist()
    table[1][field] = value
    pq.write_table(pa.Table.from_pylist(table, schema=schema), folder / "rows.parquet")


def set_manifest(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda f: (f / "manifest.json").unlink(), ["manifest.json", "not found"]),
        (lambda f: (f / "rows.parquet").unlink(), ["rows.parquet", "not found"]),
        (lambda f: set_manifest(f, "{"), ["manifest.json", "not JSON"]),
        (lambda f: set_manifest(f, "[]"), ["manifest.json", "list", "object"]),
        (lambda f: set_manifest(f, "{}"), ["manifest.json", "schema_version", "None", "1"]),
        (lambda f: set_manifest(f, '{"schema_version": 2}'), ["schema_version", "2", "1"]),
        (lambda f: set_manifest(f, '{"schema_version": 1}'), ["rows.parquet", "fingerprint"]),
        (lambda f: (f / "rows.parquet").write_bytes(b""), ["rows.parquet", "not a Parquet file"]),
        (lambda f: (f / "rows.parquet").write_text("a,b"), ["rows.parquet", "not a Parquet file"]),
        (
            lambda f: (f / "rows.parquet").write_bytes((f / "rows.parquet").read_bytes()[:-100]),
            ["rows.parquet", "not a Parquet file"],
        ),
        (lambda f: tamper(f, "reference", "No."), ["rows.parquet", "fingerprint differs"]),
        (lambda f: tamper(f, "messages", []), ["row 2", "'q2'", "messages", "none"]),
        (lambda f: tamper(f, "id", None), ["row 2", "id", "missing"]),
    ],
)
def test_a_broken_dataset_names_file_and_fault(
    tmp_path: Path, change: Callable[[Path], object], named: list[str]
) -> None:
    message = broken(tmp_path / "set", change)
    for part in [str(tmp_path / "set"), *named]:
        assert part in message


def test_a_dataset_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(RecordError, match=r"manifest.json: not found, expected a dataset"):
            read_dataset(path)


def at(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    """Set one field of a row; `...` removes it."""

    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        if value is ...:
            del data[path[-1]]
        else:
            data[path[-1]] = value

    return change


CRITERIA = ("rubric", "criteria")
FIRST = ("responses", 0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (at("id", value=...), ["id", "missing"]),
        (at("id", value=""), ["id", "''"]),
        (at("id", value=7), ["id", "7"]),
        (at("messages", value=...), ["messages", "missing"]),
        (at("messages", value=[]), ["'q1'", "messages", "none"]),
        (at("messages", value="hi"), ["messages", "'hi'", "list"]),
        (at("messages", 0, value="hi"), ["messages[0]", "'hi'", "object"]),
        (at("messages", 0, "role", value="doctor"), ["messages[0]", "role", "'doctor'", "user"]),
        (at("messages", 0, "role", value="assistant"), ["messages", "'assistant'", "'user'"]),
        (at("messages", 0, "content", value=3), ["messages[0]", "content", "int", "string"]),
        (at("messages", 0, "content", value=...), ["messages[0]", "content", "missing"]),
        (at("messages", 0, "name", value="Ann"), ["messages[0]", "unknown", "'name'"]),
        (at("sauce", value="x"), ["unknown", "'sauce'", "source"]),
        (at("source", value=["x"]), ["source", "['x']", "text"]),
        (at("reference", value=1), ["reference", "1", "text"]),
        (at("difficulty", value="hard"), ["'q1'", "difficulty", "'hard'", "number"]),
        (at("difficulty", value=11), ["difficulty", "11", "0 to 10"]),
        (at("difficulty", value=float("nan")), ["difficulty", "nan"]),
        (at("difficulty", value=True), ["difficulty", "True"]),
        (at("rubric", value=[]), ["rubric", "[]", "object"]),
        (at("rubric", "criteria", value=...), ["rubric", "criteria", "missing"]),
        (at("rubric", "safety_only", value="no"), ["rubric", "safety_only", "'no'"]),
        (at("rubric", "safety_only", value=True), ["rubric", "safety_only"]),
        (at(*CRITERIA, 0, "tier", value="main"), ["criteria[0]", "tier", "'main'", "proficiency"]),
        (at(*CRITERIA, 0, "weight", value=0.5), ["rubric", "weights", "0.5", "1"]),
        (at(*CRITERIA, 0, "weight", value="1"), ["criteria[0]", "weight", "'1'"]),
        (at(*CRITERIA, 0, "wieght", value=1), ["criteria[0]", "unknown", "'wieght'", "weight"]),
        (at(*CRITERIA, 0, "text", value=...), ["criteria[0]", "text", "missing"]),
        (at(*CRITERIA, 0, "axis", value=2), ["criteria[0]", "axis", "2"]),
        (at(*CRITERIA, 1, "id", value="dose"), ["rubric", "'dose'", "unique"]),
        (at(*CRITERIA, 2, "kind", value="harm"), ["criteria[2]", "kind", "'harm'"]),
        (at("responses", value={}), ["responses", "{}", "list"]),
        (at("responses", 1, "id", value="a"), ["responses", "'a'", "unique"]),
        (at(*FIRST, "text", value=None), ["responses[0]", "text", "missing"]),
        (at(*FIRST, "text", value=5), ["responses[0]", "text", "int", "string"]),
        (at(*FIRST, "model", value=5), ["responses[0]", "model", "5"]),
        (at(*FIRST, "score", value=5), ["responses[0]", "unknown", "'score'"]),
        (
            at(*FIRST, "verdicts", value=[{"criterion": "dose", "verdict": "maybe"}]),
            ["responses[0]", "'a'", "verdicts['dose']", "'maybe'", "abstain"],
        ),
        (
            at(*FIRST, "verdicts", value={"dose": True}),
            ["responses[0]", "verdicts['dose']", "True", "met"],
        ),
        (
            at(*FIRST, "verdicts", value=[{"criterion": "dose", "verdict": "met"}] * 2),
            ["responses[0]", "verdicts[1]", "'dose' repeats"],
        ),
        (at(*FIRST, "verdicts", value={"dosis": "met"}), ["'a'", "['dosis']", "rubric"]),
        (at(*FIRST, "verdicts", value="met"), ["verdicts", "'met'", "list"]),
        (at(*FIRST, "verdicts", value=[3]), ["verdicts[0]", "3", "object"]),
        (
            at(*FIRST, "votes", value=[{"criterion": "dose", "votes": "Neutral"}]),
            ["votes['dose']", "'Neutral'", "list"],
        ),
        (at(*FIRST, "construction", value="x"), ["construction", "'x'", "list"]),
        (at(*FIRST, "construction", value=[1]), ["construction", "(1,)", "texts"]),
    ],
)
def test_a_bad_row_names_file_line_field_and_value(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], named: list[str]
) -> None:
    data = copy.deepcopy(to_dict(replace(ROW, id="q1")))
    change(data)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(to_dict(replace(ROW, id="q0"))) + "\n" + json.dumps(data) + "\n")
    with pytest.raises(RecordError) as caught:
        read_jsonl(path)
    for part in [f"{path}: line 2: ", *named]:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b'{"id": "q1"', ["line 1", "not JSON"]),
        (b"\n\n[1, 2]", ["line 3", "list", "object"]),
        (b"[" * 100_000, ["line 1", "not JSON"]),
        (b'{"id": ' + b"9" * 5000 + b"}", ["line 1", "not JSON"]),
        (b'{"id": "\xff"}', ["not UTF-8"]),
        (
            json.dumps(to_dict(ROW)).encode() + b"\n" + json.dumps(to_dict(ROW)).encode(),
            ["line 2", "id", "'q1' repeats", "line 1"],
        ),
    ],
)
def test_a_broken_line_names_file_and_line(
    tmp_path: Path, content: bytes, named: list[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(RecordError) as caught:
        read_jsonl(path)
    for part in [str(path), *named]:
        assert part in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"nowhere.jsonl: not found, expected a JSON lines file"):
        read_jsonl(tmp_path / "nowhere.jsonl")
