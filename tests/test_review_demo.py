"""The demo: filled from the shipped sample, with work to do, and again with new passwords."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from promedical.review.accounts import log_in
from promedical.review.app import ReviewSettings
from promedical.review.demo import ACCOUNTS, DATABASE, DemoError, DemoRecipe, prepare
from promedical.review.tables import Assignment, Reviewer, Round


def test_the_demo_is_filled_and_can_be_started_again(tmp_path: Path) -> None:
    database, passwords = prepare(tmp_path / "demo")
    assert set(passwords) == set(ACCOUNTS)
    assert (tmp_path / "demo" / DATABASE).stat().st_mode & 0o077 == 0
    for login, password in passwords.items():
        assert log_in(database, login, password, "127.0.0.1", ReviewSettings())
    with database.read() as session:
        assert {r.kind for r in session.query(Round)} == {"rubrics", "adjudication"}
        states = Counter((a.part, a.state) for a in session.query(Assignment))
        before = session.query(Assignment).count()
    # Something finished, so that there are figures, and something to do for each role.
    for part in ("rubric", "first"):
        assert states[part, "done"] > 0
        assert states[part, "open"] > 0
    assert states["third", "open"] > 0
    database.close()

    database, again = prepare(tmp_path / "demo")
    with database.read() as session:
        assert session.query(Assignment).count() == before
    assert not set(again.values()) & set(passwords.values())
    assert log_in(database, "lead", again["lead"], "127.0.0.1", ReviewSettings())
    with database.write() as session:
        session.query(Reviewer).filter_by(login="lead").one().login = "somebody"
    database.close()
    with pytest.raises(DemoError, match="other accounts"):
        prepare(tmp_path / "demo")


@pytest.mark.parametrize(("field", "value"), [("language", "fr"), ("port", 70000)])
def test_settings_that_cannot_be(field: str, value: object) -> None:
    with pytest.raises(DemoError, match=field):
        DemoRecipe(**{field: value})  # type: ignore[arg-type]
