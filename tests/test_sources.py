"""The adapters: what published rows become (golden files), and that no row is ever lost."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from promedical.corpus.sources import SOURCES, Columns, Kept, Read, Rejected, SourceSettings
from promedical.corpus.stage import CorpusError
from promedical.records import to_dict

DATA = Path(__file__).parent / "data"
SAMPLES = DATA / "sources"

CSV_COLUMNS = Columns("ask", answer="tell", id="number", source="where")
TALK = Columns(messages="talk", system="rules", licence="terms")
SETTINGS = [
    SourceSettings("medqa", "medqa"),
    SourceSettings("medmcqa", "medmcqa"),
    SourceSettings("pubmedqa", "pubmedqa"),
    SourceSettings("medquad", "medquad"),
    SourceSettings("dahl", "dahl"),
    SourceSettings("chatdoctor", "chatdoctor"),
    SourceSettings("medinstruct-52k", "medinstruct"),
    SourceSettings("medical-instruction-120k", "medical_instruction"),
    SourceSettings("medical-eval-sphere", "medical_eval_sphere"),
    SourceSettings("kqa", "kqa"),
    SourceSettings("medsafetybench", "medsafetybench"),
    SourceSettings("healthbench", "healthbench"),
    SourceSettings("healthbench-graded", "healthbench_graded"),
    SourceSettings("ultramedical-preference", "ultramedical_preference"),
    SourceSettings("rar-medicine", "rar_medicine"),
    SourceSettings("csv", "table/questions.csv", columns=CSV_COLUMNS),
    SourceSettings("jsonl", "table/conversations.jsonl", columns=TALK, label="ward"),
]


def read(name: str, path: Path | str, **settings: Any) -> list[Read]:
    return list(SOURCES[name](SourceSettings(name, str(path), **settings)))


def lean(value: Any) -> Any:
    """Without empty fields, which would hide the others in the golden files."""
    if isinstance(value, dict):
        return {k: lean(v) for k, v in value.items() if v not in (None, [], "", False)}
    return [lean(v) for v in value] if isinstance(value, list) else value


def shown(item: Read) -> dict[str, Any]:
    where = {"file": item.file, "line": item.line}
    if isinstance(item, Kept):
        return where | {"row": lean(to_dict(item.row))}
    return where | {"field": item.field, "reason": item.reason, "detail": item.detail}


def golden_of(settings: SourceSettings) -> str:
    sample = SourceSettings(
        settings.name,
        str(SAMPLES / str(settings.path)),
        columns=settings.columns,
        label=settings.label,
    )
    items = [shown(item) for item in SOURCES[settings.name](sample)]
    return json.dumps(items, indent=1, ensure_ascii=False) + "\n"


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: s.name)
def test_golden_mapping(settings: SourceSettings) -> None:
    golden = DATA / "golden" / "sources" / f"{settings.name}.json"
    assert golden_of(settings) == golden.read_text(encoding="utf-8")


def test_every_source_has_a_golden_file() -> None:
    # The parquet table is the jsonl table, and is compared with it below.
    assert {s.name for s in SETTINGS} == set(SOURCES) - {"parquet"}


# --- no row is lost -------------------------------------------------------------------------------


def lines_accounted(items: list[Read]) -> int:
    return sum(item.lines if isinstance(item, Rejected) else 1 for item in items)


@examples(max_examples=40, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=40), st.just(b'{"question": "How?"}'))))
@example([b'{"question": "How?"}', b"\xff", b"[]", b'{"question": 3}', b'{"question": "\\ud800"}'])
@example([b'{"question": "a"} {"question": "b"}', b"NaN", b"[" * 2000])
def test_every_line_of_a_jsonl_file_is_a_row_or_rejected(
    tmp_path_factory: pytest.TempPathFactory, parts: list[bytes]
) -> None:
    content = b"\n".join(parts)
    path = tmp_path_factory.mktemp("lines") / "rows.jsonl"
    path.write_bytes(content)
    lines = [n for n, line in enumerate(content.split(b"\n"), start=1) if line.strip()]
    items = read("jsonl", path)
    assert [item.line for item in items] == lines
    good = [n for n, part in enumerate(content.split(b"\n"), 1) if part == b'{"question": "How?"}']
    assert {item.line for item in items if isinstance(item, Kept)} >= set(good)
    assert lines_accounted(items) == len(lines)
    packed = path.with_name("rows.jsonl.gz")
    packed.write_bytes(gzip.compress(content))
    outcome = [(type(item), item.line) for item in items]
    assert [(type(item), item.line) for item in read("jsonl", packed)] == outcome


CELLS = st.sampled_from(['"', ",", "a", "How?", "x,How?", "\r", "\xff", '""', "\x00"])


@examples(max_examples=40, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=20), st.lists(CELLS).map(lambda c: "".join(c)))))
@example(['1,"How?', "2,How?", '3,"never closed', "4,How?"])
def test_every_line_of_a_csv_file_is_in_a_row_or_rejected(
    tmp_path_factory: pytest.TempPathFactory, parts: list[bytes | str]
) -> None:
    content = b"\n".join(p if isinstance(p, bytes) else p.encode("latin-1") for p in parts)
    path = tmp_path_factory.mktemp("cells") / "rows.csv"
    path.write_bytes(b"number,question\n" + content)
    numbered = enumerate((b"number,question\n" + content).split(b"\n"), start=1)
    lines = {n for n, line in numbered if n > 1 and line.strip()}
    covered: list[int] = []
    for item, lines_taken in raw_lines(path):
        covered += range(item, item + lines_taken)
    assert len(covered) == len(set(covered))
    assert lines <= set(covered)
    # Blank lines belong to a row only inside a quote.
    assert min(covered, default=2) > 1


def raw_lines(path: Path) -> Iterator[tuple[int, int]]:
    from promedical.corpus.sources.files import raw_rows

    for item in raw_rows(SourceSettings("csv", str(path))):
        yield item.line, item.lines


@examples(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.text(), st.text(min_size=1)), max_size=8))
def test_csv_that_is_whole_reads_as_the_module_csv_reads_it(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]
) -> None:
    from promedical.corpus.sources.files import raw_rows
    from promedical.corpus.sources.reading import Raw

    text = io.StringIO(newline="")
    writer = csv.writer(text, quoting=csv.QUOTE_ALL)
    writer.writerow(["a", "b"])
    valid = [row for row in rows if "".join(row).isprintable() or "\n" in "".join(row)]
    valid = [row for row in valid if not any("\ud800" <= c <= "\udfff" for c in "".join(row))]
    writer.writerows(valid)
    path = tmp_path_factory.mktemp("whole") / "rows.csv"
    path.write_text(text.getvalue(), encoding="utf-8", newline="")
    read_back = [r.data for r in raw_rows(SourceSettings("csv", str(path))) if isinstance(r, Raw)]
    assert [tuple(data.values()) for data in read_back] == valid


@examples(max_examples=40, deadline=None)
@given(
    st.lists(st.text(max_size=20), min_size=2, max_size=6),
    st.integers(0, 5),
    st.sampled_from([None, 1, 4]),
)
def test_a_broken_element_of_an_array_costs_itself_alone(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], broken: int, indent: int | None
) -> None:
    # Text of its own in every element, so that none passes for another.
    rows = [{"question": f"{n} {text}"} for n, text in enumerate(texts)]
    broken %= len(rows)
    document = json.dumps(rows, indent=indent)
    element = json.dumps(rows[broken], indent=indent)
    if indent:
        element = element.replace("\n", "\n" + " " * indent)
    assert element in document
    damaged = document.replace(element, element.replace('"question":', '"question"', 1), 1)
    path = tmp_path_factory.mktemp("array") / "rows.json"
    path.write_text(damaged)
    items = read("jsonl", path)
    kept = [i.row.messages[0].content for i in items if isinstance(i, Kept)]
    whole = [r["question"].strip() for n, r in enumerate(rows) if n != broken]
    assert kept == whole
    assert any(i.reason == "broken_row" for i in items if isinstance(i, Rejected))


def test_an_array_names_the_line_of_each_element(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[\n {"question": "One?"},\n 3,\n {"question": "Two?"}\n]\n')
    found = [(item.line, isinstance(item, Kept)) for item in read("jsonl", path)]
    assert found == [(2, True), (3, False), (4, True)]
    path.write_text('[\n {"question": "One?"},\n {"question": "Tw')
    items = read("jsonl", path)
    assert [i.reason for i in items if isinstance(i, Rejected)] == ["broken_row", "broken_file"]
    # Bytes that are no UTF-8 make their own row unusable.
    path.write_bytes(b'[{"question": "\xff"}, {"question": "Two?"}]')
    (bad, good) = read("jsonl", path)
    assert isinstance(bad, Rejected)
    assert bad.reason == "not_unicode"
    assert isinstance(good, Kept)


def test_a_gzip_that_breaks_off_is_told(tmp_path: Path) -> None:
    text = "".join(f'{{"question": "Number {n}?"}}\n' for n in range(5_000)).encode()
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(text)[:-50])
    *items, last = read("jsonl", path)
    assert isinstance(last, Rejected)
    assert last.reason == "broken_file"
    assert last.line == len(items) + 1
    assert len(items) > 4_000
    assert all(isinstance(item, Kept) for item in items[:-1])


def test_a_quote_that_is_not_closed_costs_one_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    rows = [f"{n},How many is {n}?" for n in range(5_000)]
    rows[10] = '10,"never closed'
    path.write_text("\n".join(["number,question", *rows]))
    items = read("csv", path)
    assert [item.line for item in items] == list(range(2, 5_002))
    assert [i.line for i in items if isinstance(i, Rejected)] == [12]


def test_a_broken_document_does_not_stop_the_others(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text("<Document>\n<QAPairs>")
    (tmp_path / "b.xml").write_text(
        '<Document source="X"><QAPair pid="1"><Question>Why?</Question></QAPair>'
        '<QAPair pid="2"><Answer>No question.</Answer></QAPair></Document>'
    )
    broken, good, without = read("medquad", tmp_path)
    assert (broken.file, broken.line) == ("a.xml", 2)
    assert isinstance(broken, Rejected)
    assert broken.reason == "broken_file"
    assert isinstance(good, Kept)
    assert good.row.id == "medquad-X-b-1"
    assert isinstance(without, Rejected)
    assert (without.line, without.field) == (2, "question")


# --- other places ---------------------------------------------------------------------------------


def test_parquet_reads_as_jsonl_does(tmp_path: Path) -> None:
    rows = [{"question": "One?", "answer": "1"}, {"question": None, "answer": "2"}]
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    columns = Columns(answer="answer")
    name = {"label": "mine", "columns": columns}
    both = [read("jsonl", lines, **name), read("parquet", tmp_path / "rows.parquet", **name)]
    shapes = [[{**shown(item), "file": ""} for item in items] for items in both]
    assert shapes[0] == shapes[1]
    assert [type(item) for item in both[1]] == [Kept, Rejected]


def test_medmcqa_counts_from_zero_in_parquet(tmp_path: Path) -> None:
    row = {"id": "i", "question": "Q?", **{f"op{c}": c.upper() * 2 for c in "abcd"}}
    rows = [row | {"id": f"i{cop}", "cop": cop} for cop in (-1, 0, 3, 4)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    lines = tmp_path / "rows.json"
    lines.write_text("".join(json.dumps(r) + "\n" for r in rows))

    def references(path: Path) -> list[Any]:
        items = read("medmcqa", path)
        return [i.row.reference if isinstance(i, Kept) else i.reason for i in items]

    wrong = "unknown_option"
    assert references(tmp_path / "rows.parquet") == [None, "A. AA", "D. DD", wrong]
    assert references(lines) == [wrong, wrong, "C. CC", "D. DD"]


class Streamed:
    """What `datasets.load_dataset` is called with, and what it gives."""

    def __init__(self, rows: list[dict[str, Any]], error: Exception | None = None) -> None:
        self.rows, self.error = rows, error
        self.asked: list[Any] = []

    def load_dataset(self, *args: Any, **options: Any) -> Iterator[dict[str, Any]]:
        self.asked.append((args, options))
        yield from self.rows
        if self.error is not None:
            raise self.error


def as_datasets(monkeypatch: pytest.MonkeyPatch, streamed: Streamed) -> None:
    module = types.SimpleNamespace(load_dataset=streamed.load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_the_hub_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    context = {"contexts": ["Some abstract."], "labels": ["X"]}
    row = {
        "pubid": 7,
        "question": "So?",
        "context": context,
        "long_answer": "It is.",
        "final_decision": "yes",
    }
    streamed = Streamed([row])
    as_datasets(monkeypatch, streamed)
    settings = SourceSettings("pubmedqa", hub="qiaojin/PubMedQA", config="pqa_labeled")
    (item,) = SOURCES["pubmedqa"](settings)
    assert isinstance(item, Kept)
    assert (item.file, item.line) == ("hub:qiaojin/PubMedQA/pqa_labeled:train", 1)
    assert item.row.id == "pubmedqa-7"
    assert item.row.messages[0].content == "Some abstract.\n\nSo?"
    assert item.row.reference == "Yes. It is."
    expected = (("qiaojin/PubMedQA", "pqa_labeled"), {"split": "train", "streaming": True})
    assert streamed.asked == [expected]


def test_a_connection_that_breaks_is_no_end_of_data(monkeypatch: pytest.MonkeyPatch) -> None:
    as_datasets(monkeypatch, Streamed([{"question": "One?"}], ConnectionError("gone")))
    with pytest.raises(CorpusError, match=r"hub:a/b:train: cannot be read \(ConnectionError"):
        list(SOURCES["dahl"](SourceSettings("dahl", hub="a/b")))


def test_without_datasets_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CorpusError, match=r"pip install 'promedical\[data\]'"):
        list(SOURCES["dahl"](SourceSettings("dahl", hub="a/b")))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, None, "not found"),
        ("rows.txt", b"", "another kind, expected .jsonl, .json, .csv, .parquet"),
        ("rows.parquet", b"PAR1", "not a Parquet file"),
        ("rows.csv", b"", "empty, expected a CSV file with a header"),
        ("rows.csv", b'"a', "line 1: not the header"),
        ("rows.csv", b"a,a\n1,2", "line 1: not the header"),
    ],
)
def test_files_that_cannot_be_read(
    tmp_path: Path, name: str | None, content: bytes | None, message: str
) -> None:
    path = tmp_path / (name or "nothing.jsonl")
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        read("jsonl", path)


def test_an_empty_folder_and_settings_that_name_no_place(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no file to read in this folder"):
        read("jsonl", tmp_path)
    with pytest.raises(CorpusError, match="neither path nor hub"):
        SourceSettings("jsonl")
    with pytest.raises(CorpusError, match="both path and hub"):
        SourceSettings("jsonl", path="x", hub="a/b")
    with pytest.raises(CorpusError, match="limit: found -1"):
        SourceSettings("jsonl", path="x", limit=-1)


def test_what_was_rejected_never_quotes_the_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    secret = "my sister's HIV test"
    rows: list[Any] = [
        {"question": [secret]},
        {"talk": secret},
        {"talk": [{"role": secret, "content": secret}]},
        secret,
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + secret + "\n")
    for columns in (Columns(), Columns(messages="talk")):
        items = read("jsonl", path, columns=columns)
        assert all(isinstance(item, Rejected) for item in items)
        assert not any(secret in repr(item) for item in items)
