"""The interface's text in English and Chinese.

Every part of the application keeps its own text in `wording_<part>.py`, a dict WORDING: key →
{"en": …, "zh": …}, with `{name}` where a value goes in. Keys begin with the part's name and a dot.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache

__all__ = ["LANGUAGES", "translator", "words"]

LANGUAGES = ("en", "zh")
PARTS = ("core", "rounds", "adjudication", "exchange")


@cache
def words() -> dict[str, dict[str, str]]:
    """Every text: key → language → text.

    Raises:
        ValueError: two parts use the same key.
    """
    found: dict[str, dict[str, str]] = {}
    for part in PARTS:
        name = f"promedical.review.wording_{part}"
        if importlib.util.find_spec(name) is None:
            continue
        for key, texts in importlib.import_module(name).WORDING.items():
            if key in found:
                raise ValueError(f"wording: {key!r} is in two parts, expected one")
            found[key] = texts
    return found


def translator(language: str) -> Callable[..., str]:
    """A function from key and values to text; templates call it `t`.

    Raises:
        KeyError: when called with a key that no part has.
    """
    texts = words()
    chosen = language if language in LANGUAGES else "en"

    def t(key: str, **values: object) -> str:
        text = texts[key][chosen]
        return text.format(**values) if values else text

    return t
