"""Where a result comes from: what every committed result JSON carries, so that it can be redone.

A result without its command, commit, seed and machine is a rumour. `provenance` collects them,
`check` says what a result lacks (the test suite runs it over `benchmarks/results/*.json`).
A path outside the project is recorded as a variable and the file's name, with the file's hash
beside it, never as the path; no host name, no user name, no secret is recorded.

Left to others: what the result itself holds, and the tables rendered from it
(`promedical.figures`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = [
    "REQUIRED",
    "check",
    "code_state",
    "portable",
    "project_root",
    "provenance",
    "recipe_hash",
]

# Every field must be there; those in `NULLABLE` may be null, which says "there is none".
REQUIRED = (
    "command",
    "commit",
    "dirty",
    "recipe_hash",
    "seed",
    "data_fingerprint",
    "versions",
    "machine",
    "wall_time_s",
)
NULLABLE = ("recipe_hash", "data_fingerprint")

VARIABLES = ("GRADED_DATA", "PROMEDICAL_CACHE")
PACKAGES = (
    "promedical",
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "pyarrow",
    "numpy",
    "scipy",
    "scikit-learn",
    "gguf",
    "model2vec",
)
# What can change a result. The results themselves and the documents made from them cannot.
_CODE = ("src", "recipes", "benchmarks", "pyproject.toml", "constraints.txt")

# An absolute, home or parent path at the start of an argument or after a separator.
_PATH = re.compile(r"(?<![^\s=:,;'\"(\[])(?:file://)?(?:~?/|~$|\.\./|\.\.$)[^\s,;:'\")\]]*")
_SECRET = re.compile(r"^--?(?:[\w-]*[-_])?(?:key|token|secret|password)$", re.IGNORECASE)


def provenance(
    *,
    seed: int | None,
    recipe: Any = None,
    data_fingerprint: str | None = None,
    command: Sequence[str] | None = None,
    started: float | None = None,
) -> dict[str, Any]:
    """What a result JSON keeps under "provenance".

    Args:
        seed: of the run.
        recipe: the run's settings, a mapping or a dataclass; only their hash is kept.
        data_fingerprint: of the rows that went in; None if no data did.
        command: argv; this process's by default.
        started: reading of `time.perf_counter()` or `time.time()` when the run began; the start of
            the process by default.

    Returns:
        A dict of plain JSON types with every field of `REQUIRED`. `commit` and `dirty` are None
        when the code does not run from a git checkout (then `versions` says which release it is).
        `dirty` is about code, recipes and pins: a result or document that differs from the commit
        does not count. `inputs` gives the SHA-256 of each outside file that the command names.
    """
    root = project_root()
    argv, inputs = _portable_command(list(sys.argv if command is None else command), root)
    return {
        "command": argv,
        "inputs": inputs,
        **code_state(),
        "recipe_hash": None if recipe is None else recipe_hash(recipe),
        "seed": seed,
        "data_fingerprint": data_fingerprint,
        "versions": _versions(),
        "machine": _machine(),
        "wall_time_s": _wall_time(started),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def code_state() -> dict[str, Any]:
    """`commit` and `dirty` of the code that runs now, as `provenance` has them."""
    commit, dirty = _commit(project_root())
    return {"commit": commit, "dirty": dirty}


def check(result: Mapping[str, Any]) -> list[str]:
    """What a result lacks to be committed: one sentence per fault, empty if nothing."""
    found = result.get("provenance")
    if not isinstance(found, Mapping):
        return ["provenance: missing, expected an object made by promedical.provenance"]
    faults = []
    for field in REQUIRED:
        if field not in found:
            faults.append(f"provenance.{field}: missing")
        elif found[field] is None and field not in NULLABLE:
            faults.append(f"provenance.{field}: null, expected a value")
    machine = found.get("machine")
    if isinstance(machine, Mapping):
        wanted = ("cpu", "cores", "memory_gb", "gpu")
        faults += [f"provenance.machine.{name}: missing" for name in wanted if name not in machine]
    for argument in found.get("command") or ():
        if any(os.path.isabs(m.group().removeprefix("file://")) for m in _paths(str(argument))):
            faults.append(f"provenance.command: {argument!r} is a path of one machine")
    return faults


def project_root() -> Path | None:
    """The git checkout that this package runs from, or None if it is installed elsewhere."""
    package = Path(__file__).resolve().parent
    root = package.parent.parent
    # An installed package may lie inside some other repository (in its .venv): that one's commit
    # would say nothing about this code.
    return root if package == root / "src" / "promedical" and (root / ".git").exists() else None


def recipe_hash(recipe: Any) -> str:
    """SHA-256 over a recipe's settings, whatever their order; a path counts by `portable`."""
    return hashlib.sha256(
        json.dumps(_plain(recipe), sort_keys=True, ensure_ascii=False).encode()
    ).hexdigest()


def portable(path: str | Path) -> str:
    """A path that means the same on another machine.

    Inside the project: relative to it. Under a folder that `GRADED_DATA` or `PROMEDICAL_CACHE`
    names: that variable and the rest. Under the working folder: relative. Anywhere else:
    `$ELSEWHERE/` and the name alone.
    """
    given = Path(path).expanduser()
    full = Path(os.path.abspath(given))
    root = project_root()
    if root is not None and full.is_relative_to(root):
        return full.relative_to(root).as_posix()
    for name in VARIABLES:
        folder = os.environ.get(name)
        if folder and full.is_relative_to(os.path.abspath(folder)):
            return Path(f"${name}", full.relative_to(os.path.abspath(folder))).as_posix()
    if full.is_relative_to(Path.cwd()):
        return full.relative_to(Path.cwd()).as_posix()
    return f"$ELSEWHERE/{full.name}"


def _portable_command(argv: list[str], root: Path | None) -> tuple[list[str], dict[str, str]]:
    if not argv:
        return [], {}
    out = _program(argv[0], root)
    inputs: dict[str, str] = {}

    def named(path: str) -> str:
        name = portable(path)
        if name.startswith("$"):
            digest = _digest(Path(path).expanduser())
            if digest is not None:
                inputs[name] = digest
        return name

    hide = False
    for argument in argv[1:]:
        flag, equals, _ = argument.partition("=")
        if hide:
            out.append("***")
            hide = False
        elif _SECRET.match(flag):
            out.append(f"{flag}=***" if equals else flag)
            hide = not equals
        else:
            argument = re.sub(r"://[^/@\s]*@", "://***@", argument)
            value = argument[len(flag) + 1 :] if equals and flag.startswith("-") else argument
            if _PATH.match(value) and Path(value).expanduser().exists():
                # A path that is there is taken whole: its folders' names may hold spaces.
                out.append(argument.removesuffix(value) + named(value))
                continue
            for match in reversed(_paths(argument)):
                path = match.group().removeprefix("file://")
                argument = argument[: match.start()] + named(path) + argument[match.end() :]
            out.append(argument)
    return out, inputs


def _paths(argument: str) -> list[re.Match[str]]:
    # The `//host/…` of a URL follows a colon and looks like a path; it is none.
    return [m for m in _PATH.finditer(argument) if not m.group().startswith("//")]


def _program(program: str, root: Path | None) -> list[str]:
    """argv[0] as a person would type it: `promedical`, `python -m promedical.x`, `python x.py`."""
    path = Path(program)
    if path.suffix != ".py":
        return ["python", program] if program in ("-c", "-m") else [path.name]
    package = Path(__file__).resolve().parent
    full = Path(os.path.abspath(path))
    if full.is_relative_to(package):
        parts = full.relative_to(package.parent).with_suffix("").parts
        module = ".".join(parts).removesuffix(".__main__")
        return ["python", "-m", module]
    if root is not None and full.is_relative_to(root):
        return ["python", full.relative_to(root).as_posix()]
    return ["python", path.name]


def _digest(path: Path) -> str | None:
    """SHA-256 of a file, a dataset's fingerprint for its folder, None for anything else."""
    try:
        if path.is_file():
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        manifest = json.loads((path / "manifest.json").read_text())
        return str(manifest["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted(str(_plain(v)) for v in value)
    if isinstance(value, Path):
        return portable(value)
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(f"recipe: found a {type(value).__name__}, expected plain settings")


def _commit(root: Path | None) -> tuple[str | None, bool | None]:
    if root is None:
        return None, None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        paths = [p for p in _CODE if (root / p).exists()]
        status = git("status", "--porcelain", "--", *paths, ":!benchmarks/results")
        return git("rev-parse", "HEAD"), bool(status)
    except (OSError, subprocess.CalledProcessError):
        return None, None


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    if found["promedical"] is None:  # run from a checkout that was not installed
        found["promedical"] = getattr(sys.modules.get("promedical"), "__version__", None)
    return found


def _machine() -> dict[str, Any]:
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gb": _memory_gb(),
        "gpu": _gpu(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    """Memory that this process may use: the machine's, or less if its container is limited."""
    try:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or "max"
        size = min(size, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return round(size / 1024**3, 1)


def _gpu() -> str | None:
    try:
        import torch
    except ImportError:
        return None
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return f"{count} × {torch.cuda.get_device_name(0)}"
    if torch.backends.mps.is_available():
        return "Apple GPU (MPS)"
    return None


def _wall_time(started: float | None) -> float | None:
    if started is None:
        return _process_age()
    # Both clocks are accepted because mixing them up would only show at the end of a long run.
    # A perf_counter reading of 1e9 seconds would mean 31 years of uptime.
    now = time.time() if started > 1e9 else time.perf_counter()
    return round(max(0.0, now - started), 2)


def _process_age() -> float | None:
    try:
        # Field 22 of proc(5)'s stat: start time in clock ticks after boot.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return round(time.clock_gettime(time.CLOCK_BOOTTIME) - started, 2)
    except (OSError, ValueError, IndexError, AttributeError):
        return None
