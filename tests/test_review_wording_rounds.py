"""The rubric editor's scripts and the wording know the same texts."""

from __future__ import annotations

import re

from promedical.review.pages import HERE, STATIC
from promedical.review.wording_rounds import WORDING
from promedical.rubric import VetoKind

SCRIPTS = ("rubric.js", "rubric_view.js", "rubric_keys.js", "rubric_changes.js")


def test_every_text_that_a_script_says_is_handed_over() -> None:
    listed = set(re.findall(r'"(\w+)"', (HERE / "templates" / "_rubric_words.html").read_text()))
    known = {key.removeprefix("rubric_js.") for key in WORDING if key.startswith("rubric_js.")}
    assert listed == known
    autosave = set(re.findall(r"data-([\w-]+)=", (HERE / "templates/_autosave.html").read_text()))
    for name in SCRIPTS:
        text = (STATIC / name).read_text()
        said = set(re.findall(r'words\("(\w+)"[,)]', text))
        assert said - known <= autosave, name
        for prefix in re.findall(r'words\("(\w+_)" \+', text):
            assert any(key.startswith(prefix) for key in known), prefix


def test_every_kind_of_veto_has_a_name() -> None:
    assert {f"rubric.kind_{kind.value}" for kind in VetoKind} <= set(WORDING)


def test_both_languages_have_the_same_places_for_values() -> None:
    for key, texts in WORDING.items():
        found = [set(re.findall(r"\{(\w+)\}", texts[language])) for language in ("en", "zh")]
        assert found[0] == found[1], key
