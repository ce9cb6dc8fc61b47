"""What the site's build does beyond Markdown: files outside `docs/`, and the commands' own help.

A document may link to a file of the project (`../recipes/…`, `../README.md`), so that the link
works where the project is browsed; the site carries a copy of that file under `files/`. The line
`<!-- every command's help -->` becomes what every command and verb prints with `--help`. Left to
others: which pages there are (`mkdocs.yml`), whether they are right (`tests/test_docs.py`).
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?<=\]\()(\.\./[^)#\s]+)")
HELP = "<!-- every command's help -->"
# Shown as pages already: a link to one of them leads to its page.
PAGES = {"README.md": "index.md"}


def on_files(files: Any, config: Any) -> Any:
    """Add the project's files that documents link to."""
    from mkdocs.structure.files import File

    known: set[str] = set()
    for page in files.documentation_pages():
        for target in LINK.findall(Path(page.abs_src_path).read_text(encoding="utf-8")):
            name = _outside(page.src_uri, target)
            if name is None or name in PAGES or name in known or not (ROOT / name).is_file():
                continue
            known.add(name)
            files.append(File.generated(config, f"files/{name}", abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Lead links to those copies, and put the commands' help in."""

    def link(match: re.Match[str]) -> str:
        name = _outside(page.file.src_uri, match[1])
        if name is None:
            return match[1]
        goal = PAGES.get(name, f"files/{name}")
        return os.path.relpath(goal, os.path.dirname(page.file.src_uri) or ".")

    text = LINK.sub(link, markdown)
    return text.replace(HELP, _every_help()) if HELP in text else text


def _every_help() -> str:
    """The help of all commands, with a heading for each."""
    from promedical.cli import COMMANDS, VERBS_OF

    parts = [_shown([])]
    for command in COMMANDS:
        parts += [f"## promedical {command}", _shown([command])]
        if command in VERBS_OF:
            for verb in import_module(VERBS_OF[command]).VERBS:
                parts += [f"### {command} {verb}", _shown([command, verb])]
    return "\n\n".join(parts)


def _shown(command: list[str]) -> str:
    return f"```text\n{printed_help(command)}\n```"


def printed_help(command: list[str]) -> str:
    """What `promedical COMMAND --help` prints.

    Raises:
        RuntimeError: there is no such command.
    """
    from promedical.cli import main

    out = io.StringIO()
    width = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "96"  # argparse would take this terminal's
    try:
        with contextlib.redirect_stdout(out):
            code = main([*command, "--help"])
    finally:
        if width is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = width
    if code:
        raise RuntimeError(f"promedical {' '.join(command)} --help: exit code {code}, expected 0")
    return out.getvalue().rstrip()


def _outside(page: str, target: str) -> str | None:
    """The project's file that a page links to; None where it lies in `docs/`."""
    name = os.path.normpath(os.path.join("docs", os.path.dirname(page), target))
    return None if name.startswith(("docs/", "..")) else name
