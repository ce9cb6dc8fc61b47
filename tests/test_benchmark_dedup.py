"""The de-duplication benchmark in small: its edits do what they say, its counts add up."""

from __future__ import annotations

import json
import random
from itertools import pairwise

import numpy as np
import pytest

from promedical.provenance import check

QUESTIONS = [
    "What are the symptoms of Gout ?",
    "What causes Asthma ?",
    "Is Marfan syndrome inherited ?",
    "My left knee hurts for 3 days. I have fever. Can I take 5 mg of atenolol?",
    "A 30-year-old woman has no fever. Is lisinopril safe before meals?",
    "什么药能治疗急性胃炎,患者30岁,女性?",
]


class Letters:
    """Texts as counts of letter pairs, so that no model is needed."""

    def encode(self, sentences):
        out = np.zeros((len(sentences), 64), dtype=np.float32)
        for row, text in zip(out, sentences, strict=True):
            for a, b in pairwise(text):
                row[(ord(a) * 31 + ord(b)) % 64] += 1
        return out


@pytest.fixture(scope="module")
def benchmark(benchmark_script):
    return benchmark_script("dedup")


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "instructions.jsonl"
    extra = [f"What causes condition number {i} ?" for i in range(20)]
    lines = [
        json.dumps({"id": f"c_QA:{i}", "source": "medquad", "text": t})
        for i, t in enumerate([*QUESTIONS, QUESTIONS[0], *extra])
    ]
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize(
    ("name", "text", "edited"),
    [
        ("dose", "take 5 mg now", ("take 10 mg now", "take 2.5 mg now", "take 5 g now")),
        ("age", "a 30-year-old man", ("a 33-year-old man", "a 41-year-old man")),
        ("side", "my left knee", ("my right knee",)),
        ("sex", "a man and his knee", ("a woman and her knee",)),
        ("negation", "pain without fever", ("pain with fever",)),
        ("course", "acute pain", ("chronic pain",)),
        ("drug", "take atenolol now", ("take bisoprolol now",)),
        ("topic", "What causes Asthma ?", ("What causes Gout ?",)),
        ("duration", "for 3 days", ("for 3 weeks", "for 3 years")),
    ],
)
def test_changes(benchmark, name, text, edited):
    mined = benchmark.mine(
        ["What causes Asthma ?", "Is Gout inherited ?", *["atenolol or bisoprolol"] * 3]
    )
    edit = benchmark.changes(mined)[name]
    found = {edit(text, random.Random(seed)) for seed in range(40)}
    assert found & set(edited)
    assert text not in found
    assert edit("nothing of the kind", random.Random(0)) is None


def test_keeps_are_other_texts(benchmark):
    for name, edit in benchmark.KEEP.items():
        for text in QUESTIONS:
            new = edit(text, random.Random(1))
            assert new is None or new != text, name


def test_rows(benchmark, data):
    records = benchmark.read(data)
    rows = benchmark.make_rows(records, 150, 150, seed=0)
    assert len(rows) == len({r.id for r in rows}) == 150
    assert sum(not r.edit for r in rows) == len(records)
    assert {r.half for r in rows} == {"tune", "report"}
    assert all(len({r.half for r in rows if r.family == f}) == 1 for f in range(5))
    assert rows == benchmark.make_rows(records, 150, 150, seed=0)


def test_evaluate_counts(benchmark):
    def row(id, family, edit="", keeps=True, source="medquad|x_QA:1"):
        return benchmark.Row(id, id, source, family, edit, keeps, "tune")

    rows = [
        row("b0", 0),
        row("b1", 1),
        row("k0", 0, "typo"),
        row("k1", 1, "typo"),
        row("c0", 0, "dose", keeps=False),
        row("c1", 1, "dose", keeps=False),
        row("c2", 1, "age", keeps=False),
    ]
    # b1 ends with b0, and its slip with it; one dose is lost; one age stays, with a dose of it.
    found = {"b1": "b0", "k1": "b0", "c0": "b0", "c1": "c2"}
    out = benchmark.evaluate(rows, found, "tune")
    assert out["found"]["all"] == {"rows": 2, "share": 0.5, "found": 1}
    assert out["lost"]["dose"] == {"rows": 2, "share": 1.0, "with_question": 1, "elsewhere": 1}
    assert out["lost"]["age"]["share"] == 0.0
    assert out["base"]["distinct"] == 2
    assert out["base"]["merged"] == out["base"]["medquad_lost"] == 1
    assert benchmark.evaluate(rows, found, "report")["found"]["all"]["rows"] == 0


def test_small_run(benchmark, data, tmp_path, monkeypatch):
    monkeypatch.setattr("promedical.demo.models.resolve_encoder", Letters)
    systems = ["guarded", "unguarded"]
    try:
        import datasketch  # noqa: F401

        systems.append("minhash")
    except ImportError:
        pass
    out = tmp_path / "dedup.json"
    arguments = ["--data", str(data), "--rows", "150", "--peer-rows", "80", "--workers", "1"]
    monkeypatch.setattr(benchmark, "ROWS", 150)
    code = benchmark.main([*arguments, "--systems", *systems, "--out", str(out)])
    assert code == 0
    result = json.loads(out.read_text())
    assert all("command" in fault for fault in check(result))
    assert set(result["systems"]) == {"guarded"}
    assert result["data"]["file"] == "$INSTRUCTIONS/instructions.jsonl"
    assert str(data.parent) not in json.dumps(result["data"])
    guarded, unguarded = (result["side_by_side"][n]["report"] for n in ("guarded", "unguarded"))
    assert guarded["lost"]["all"]["share"] <= unguarded["lost"]["all"]["share"]
    # Nothing of a question's text is in the result.
    assert not any(text in out.read_text() for text in QUESTIONS)
