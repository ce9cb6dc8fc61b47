"""De-duplication: nothing lost, every dropped row points to a kept one, always the same."""

from __future__ import annotations

import random
import sys
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promedical.corpus import cells
from promedical.corpus.cells import nearest_earlier, whole
from promedical.corpus.dedup import DedupSettings, dedup
from promedical.corpus.stage import CorpusError
from promedical.records import GradedInstruction, Message

WORDS = ("gout", "asthma", "left", "right", "knee", "not", "fever", "5", "50", "mg", "ibuprofen")


class Letters:
    """Texts as counts of letter pairs: alike texts are alike, without any model."""

    def encode(self, sentences):
        out = np.zeros((len(sentences), 64), dtype=np.float32)
        for row, text in zip(out, sentences, strict=True):
            for a, b in pairwise(text):
                row[(ord(a) * 31 + ord(b)) % 64] += 1
        return out


def row(id: str, *texts: str) -> GradedInstruction:
    roles = ["user" if i % 2 == 0 else "assistant" for i in range(len(texts))]
    messages = tuple(Message(r, t) for r, t in zip(roles, texts, strict=True))
    return GradedInstruction(id, messages, "test", "CC0-1.0")


def rows_of(texts) -> list[GradedInstruction]:
    return [row(str(i), text) for i, text in enumerate(texts)]


def run(rows, **changes):
    return dedup(rows, DedupSettings(**{"threshold": 0.7, **changes}), encoder=Letters())


def outcome(result):
    return [r.id for r in result.rows], [(d.id, dict(d.detail)) for d in result.dropped]


TEXTS = st.lists(st.lists(st.sampled_from(WORDS), max_size=6).map(" ".join), max_size=25)


@settings(max_examples=60, deadline=None)
@given(TEXTS, st.booleans(), st.sampled_from([1, 3]))
def test_every_row_is_accounted_for(texts, guard, neighbours):
    rows = rows_of(texts)
    result = run(rows, guard=guard, neighbours=neighbours)
    kept = [r.id for r in result.rows]
    assert sorted(kept + [d.id for d in result.dropped], key=int) == [r.id for r in rows]
    assert kept == sorted(kept, key=int)
    for dropped in result.dropped:
        assert dropped.reason == "duplicate"
        assert dropped.detail["duplicate_of"] in kept
        assert int(dropped.detail["duplicate_of"]) < int(dropped.id)
        assert dropped.detail["kind"] in ("exact", "semantic")
        assert dropped.detail["similarity"] >= 0.7 - 1e-4
    assert result.summary()["reasons"].get("duplicate", 0) == len(result.dropped)


@settings(max_examples=30, deadline=None)
@given(TEXTS, st.integers(1, 7))
def test_batches_do_not_matter(texts, batch):
    rows = rows_of(texts)
    assert outcome(run(rows, batch=batch)) == outcome(run(rows))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=6), st.data())
def test_which_of_two_comes_first_does_not_matter(words, data):
    a = " ".join(words)
    b = " ".join(data.draw(st.permutations(words))[: data.draw(st.integers(1, 6))])
    one, other = run(rows_of([a, b])), run(rows_of([b, a]))
    assert len(one.rows) == len(other.rows)
    assert [d.detail["similarity"] for d in one.dropped] == [
        d.detail["similarity"] for d in other.dropped
    ]


def test_exact_puts_case_and_punctuation_aside():
    result = run(rows_of(["Is it gout?", "is it GOUT", "is it gout 1.5", "is it gout 1 5"]))
    assert [(d.id, d.detail["kind"]) for d in result.dropped] == [("1", "exact")]


def test_turns_count_in_the_exact_comparison():
    rows = [row("a", "x y", "z", "w"), row("b", "x", "y z", "w"), row("c", "X, y", "z", "w")]
    result = run(rows, semantic=False)
    assert [(d.id, d.detail["duplicate_of"]) for d in result.dropped] == [("c", "a")]


def test_the_guard_blocks_the_nearest_and_the_next_is_found():
    texts = [
        "Which dose of ibuprofen should I take for gout?",
        "which dose of ibuprofen should i take for gout 50 mg daily",
        "Which dose of ibuprofen should I take for gout, please? 5 mg daily",
        "which dose of ibuprofen should i take for the gout please 50 mg daily",
    ]
    result = run(rows_of(texts))
    assert [(d.id, d.detail["duplicate_of"]) for d in result.dropped] == [("3", "1")]
    assert result.report["kept_apart_pairs"]["dose"] >= 2
    assert len(run(rows_of(texts), guard=False).rows) == 1


def test_a_dropped_row_leads_to_the_kept_one():
    texts = ["what causes gout", "what causes the gout?", "so what causes the gout?"]
    result = run(rows_of(texts))
    assert [d.detail["duplicate_of"] for d in result.dropped] == ["0", "0"]


def test_several_processes_give_the_same(monkeypatch):
    rng = random.Random(0)
    rows = rows_of([" ".join(rng.choices(WORDS, k=4)) for _ in range(300)])
    monkeypatch.setattr("promedical.corpus.dedup.CHUNK", 100)
    assert outcome(run(rows, workers=2)) == outcome(run(rows))


def test_any_sentence_transformers_model_by_name(monkeypatch):
    asked = []

    class SentenceTransformer(Letters):
        def __init__(self, name):
            asked.append(name)

    package = SimpleNamespace(SentenceTransformer=SentenceTransformer)
    monkeypatch.setitem(sys.modules, "sentence_transformers", package)
    rows = rows_of(["gout in the left knee", "the left knee, gout in it", "asthma and fever"])
    named = DedupSettings(encoder="some/model", threshold=0.7)
    assert outcome(dedup(rows, named)) == outcome(run(rows))
    assert asked == ["some/model"]
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(CorpusError, match="'some/model' needs sentence-transformers: pip install"):
        dedup(rows, named)


def test_settings_and_ids_are_checked():
    with pytest.raises(CorpusError, match="threshold: found 0"):
        DedupSettings(threshold=0)
    with pytest.raises(CorpusError, match="workers: found 0, expected at least 1"):
        DedupSettings(workers=0)
    with pytest.raises(CorpusError, match="row 'a': found twice"):
        run([row("a", "x"), row("a", "y")])
    assert run([]).rows == []


# --- cells ----------------------------------------------------------------------------------------


def slow_neighbours(values, least, count):
    out = []
    for i in range(len(values)):
        pairs = []
        for j in range(i):
            dot = float(values[i] @ values[j])
            square = float((values[i] @ values[i]) * (values[j] @ values[j]))
            cosine = dot / square**0.5 if square else 0.0
            if cosine >= least:
                pairs.append((-cosine, j))
        out.append(sorted(pairs)[:count])
    return out


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 50))
def test_neighbours_are_those_of_the_slow_way(seed, count, block):
    rng = np.random.default_rng(seed)
    vectors = whole(rng.normal(size=(40, 6)).astype(np.float32))
    near = nearest_earlier(vectors, least=0.3, count=count, block=block)
    slow = slow_neighbours(vectors.values.astype(np.int64), 0.3, count)
    for i, expected in enumerate(slow):
        part = slice(near.starts[i], near.starts[i + 1])
        assert len(near.cosines[part]) == len(expected)
        assert np.allclose(near.cosines[part], [-c for c, _ in expected], atol=1e-4)
        for j, cosine in zip(near.indices[part], near.cosines[part], strict=True):
            assert j < i
            assert abs(vectors.cosine(i, int(j)) - cosine) < 1e-4
            assert vectors.cosine(i, int(j)) == vectors.cosine(int(j), i)


def test_cells_find_planted_neighbours_and_nothing_else(monkeypatch):
    monkeypatch.setattr(cells, "EXACT", 100)
    rng = np.random.default_rng(1)
    base = rng.normal(size=(600, 32))
    noisy = base + 0.1 * rng.normal(size=base.shape)
    vectors = whole(np.concatenate([base, noisy]).astype(np.float32))
    near = nearest_earlier(vectors, least=0.9, count=4, cell=50, probes=2)
    assert near.compared < 1200 * 1200 / 8
    found = {
        int(i) for i in range(600, 1200) if i - 600 in near.indices[slice(*near.starts[i : i + 2])]
    }
    assert len(found) >= 590
    again = nearest_earlier(vectors, least=0.9, count=4, cell=50, probes=2, block=7, threads=3)
    assert np.array_equal(near.indices, again.indices)
    assert np.array_equal(near.starts, again.starts)


def test_a_zero_vector_is_like_nothing():
    vectors = whole(np.zeros((3, 4), dtype=np.float32))
    assert len(nearest_earlier(vectors, least=0.1, count=3).indices) == 0
    assert vectors.cosine(0, 1) == 0.0
