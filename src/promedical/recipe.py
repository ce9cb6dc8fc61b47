"""A run's settings: a YAML file and command-line flags become one frozen dataclass.

A recipe is any frozen dataclass whose fields have plain types (str, int, float, bool, Literal,
Path, `X | None`, tuple[X, ...], or another such dataclass, which is a section in YAML and
`--section.field` as a flag; a field of another type, such as a function, is no setting). A tuple
of dataclasses is a list of sections in YAML, a Mapping[str, Any] takes keys and values as they are;
both have no flag: what is said of one of many things belongs in a file. A flag is the field's name,
a YAML key is the field's name, and the order is: default, preset, file, flag. A preset is a named
set of values, chosen by a flag of that name. Nothing is looked up in a registry and nothing unknown
is ignored. A flag's help is the field's line in the docstring's "Args:".

Left to others: what a recipe means (its class, which checks ranges in `__post_init__`), and its
hash (`promedical.provenance`).
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, Protocol, TypeVar

import yaml

__all__ = [
    "RecipeError",
    "UniqueKeys",
    "load_recipe",
    "load_section",
    "plain_parser",
    "read_recipe_file",
    "recipe_parser",
    "set_flags",
]


class RecipeError(ValueError):
    """Settings that cannot be used; the message names the file or flag, the key, and the value."""


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]


T = TypeVar("T", bound=_Dataclass)


def load_recipe(
    cls: type[T],
    path: str | Path | None,
    argv: Sequence[str] = (),
    *,
    presets: Mapping[str, Mapping[str, Any]] = types.MappingProxyType({}),
    parser: argparse.ArgumentParser | None = None,
) -> T:
    """Build a recipe from its defaults, then a preset, a YAML file, and command-line flags.

    Args:
        cls: a frozen dataclass.
        path: a YAML file, or None; `--recipe FILE` in argv wins over it.
        argv: flags, without the program's name.
        presets: name → settings, nested as in YAML; `--NAME` chooses one.
        parser: what `recipe_parser` made, to show another usage line or description.

    Raises:
        RecipeError: a file that is missing or no YAML mapping, an unknown key or flag (the nearest
            known one is named), a value of the wrong type, or one that the class refuses.
    """
    parser = recipe_parser(cls, presets=presets) if parser is None else parser
    namespace, extra = parser.parse_known_args(list(argv))
    if extra:
        raise RecipeError(_unknown_flag(extra[0], parser))
    path = getattr(namespace, "recipe", None) or path
    values: dict[str, Any] = {}
    chosen = getattr(namespace, _PRESET, None)
    if chosen is not None:
        _overlay(values, _check_section(cls, presets[chosen], f"--{chosen}", prefix=""))
    if path is not None:
        _overlay(values, read_recipe_file(cls, path))
    _overlay(values, set_flags(cls, namespace))
    return _build(cls, values, "flags" if path is None else str(path))


def recipe_parser(
    cls: type[Any],
    *,
    presets: Mapping[str, Mapping[str, Any]] = types.MappingProxyType({}),
    prog: str | None = None,
    usage: str = "%(prog)s [--recipe FILE] [flags]",
    description: str | None = None,
) -> argparse.ArgumentParser:
    """A parser with `--recipe FILE`, a flag for each preset and one for each field of a recipe."""
    parser = _Parser(
        prog=prog,
        usage=usage,  # argparse's own would list dozens of flags
        description=description,
        allow_abbrev=False,
        formatter_class=_Formatter,
    )
    choice = parser.add_mutually_exclusive_group() if presets else parser
    for name, settings in presets.items():
        choice.add_argument(
            f"--{name}",
            dest=_PRESET,
            action="store_const",
            const=name,
            help=", ".join(_flat(settings)).replace("%", "%%"),
        )
    parser.add_argument(
        "--recipe", metavar="FILE", help="YAML file with any of the settings below; flags win"
    )
    _add_flags(parser.add_argument_group("settings"), parser, cls, prefix="")
    return parser


def plain_parser(*, prog: str, usage: str, description: str) -> argparse.ArgumentParser:
    """A parser for a command without a recipe, with the same errors and the same look."""
    return _Parser(
        prog=prog,
        usage=usage,
        description=description,
        allow_abbrev=False,
        formatter_class=_Formatter,
    )


def load_section(
    cls: type[T],
    whole: type[Any],
    name: str,
    path: str | Path | None,
    argv: Sequence[str],
    *,
    parser: argparse.ArgumentParser,
) -> T:
    """Build one section of a recipe: its defaults, the recipe's file, and flags of its own.

    Args:
        cls: the section's dataclass, of which `parser` has the flags, without a prefix.
        whole: the recipe that it is a section of.
        name: of the section.
        path: the recipe's YAML file, or None.

    Raises:
        RecipeError: see `load_recipe`.
    """
    namespace, extra = parser.parse_known_args(list(argv))
    if extra:
        raise RecipeError(_unknown_flag(extra[0], parser))
    values: dict[str, Any] = {}
    if path is not None:
        _overlay(values, read_recipe_file(whole, path).get(name) or {})
    _overlay(values, set_flags(cls, namespace))
    return _build(cls, values, name if path is None else f"{path}: {name}")


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    flat: list[str] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat += _flat(value, f"{prefix}{name}.")
        else:
            flat.append(f"{prefix}{name}={value}")
    return flat


def set_flags(cls: type[Any], namespace: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given as flags, nested as in the YAML file.

    Raises:
        RecipeError: a flag's value is not of its field's type.
    """
    values: dict[str, Any] = {}
    for name, given in vars(namespace).items():
        hint = _hint_of(cls, name)
        if hint is None:
            continue
        section = values
        *outer, last = name.split(".")
        for key in outer:
            section = section.setdefault(key, {})
        section[last] = _from_text(given, hint, f"--{name}")
    return values


def read_recipe_file(cls: type[Any], path: str | Path) -> dict[str, Any]:
    """Read a YAML file and check its keys and types against a recipe's fields.

    Raises:
        RecipeError: see `load_recipe`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: not found, expected a recipe in YAML") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({error})") from None
    try:
        data = yaml.load(text, Loader=UniqueKeys)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if data is None:
        return {}
    return _check_section(cls, data, str(path), prefix="")


class UniqueKeys(yaml.SafeLoader):
    """YAML that refuses a key given twice, where PyYAML would keep the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_PRESET = "chosen preset"  # no field's name, so no flag's


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Help that shows one spelling of a flag, --two-words, where --two_words works as well."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = [o for o in action.option_strings if "_" not in o or "." in o]
        flags = list(dict.fromkeys(o.replace("_", "-") for o in shown))
        if not flags or action.nargs == 0:
            return ", ".join(flags) or super()._format_action_invocation(action)
        return f"{', '.join(flags)} {self._format_args(action, str(action.metavar))}"


class _Parser(argparse.ArgumentParser):
    """argparse that raises instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise RecipeError(message)


def _build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """The dataclass, its sections first; a value that it refuses is the user's error."""
    arguments = dict(values)
    for name, hint in _fields(cls).items():
        section = _section_of(hint)
        if section is not None and arguments.get(name) is not None:
            arguments[name] = _build(section, arguments[name], f"{where}: {name}")
        entry = _entry_of(hint)
        if entry is not None and name in arguments:
            arguments[name] = tuple(
                _build(entry, section, f"{where}: {name}[{i}]")
                for i, section in enumerate(arguments[name])
            )
    for field in dataclasses.fields(cls):
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if field.init and required and field.name not in arguments:
            raise RecipeError(
                f"{where}: {field.name}: missing, expected {_describe(_fields(cls)[field.name])}"
            )
    try:
        return cls(**arguments)
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from None


def _overlay(values: dict[str, Any], over: Mapping[str, Any]) -> None:
    """Put settings over others, section by section."""
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            _overlay(values[key], value)
        else:
            values[key] = value


def _fields(cls: type[Any]) -> dict[str, Any]:
    """Field name → type, in order."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if _is_setting(hints[f.name])}


def _is_setting(hint: Any) -> bool:
    base, _ = _without_none(hint)
    if typing.get_origin(base) is tuple:
        base = typing.get_args(base)[0]
    if typing.get_origin(base) is Mapping:
        return True
    return base in _NAMES or typing.get_origin(base) is Literal or dataclasses.is_dataclass(base)


def _section_of(hint: Any) -> Any:
    """The dataclass that a field is a section of, or None; a section may be left out (`| None`)."""
    base, _ = _without_none(hint)
    return base if dataclasses.is_dataclass(base) else None


def _entry_of(hint: Any) -> Any:
    """The dataclass of which a field is a list, or None if it is something else."""
    if typing.get_origin(hint) is not tuple:
        return None
    entry = typing.get_args(hint)[0]
    return entry if dataclasses.is_dataclass(entry) else None


def _hint_of(cls: type[Any], dotted: str) -> Any:
    """The type of `section.field`, or None if the recipe has no such field."""
    hint: Any = cls
    for name in dotted.split("."):
        section = _section_of(hint)
        if section is None:
            return None
        hint = _fields(section).get(name)
    return hint


def _check_section(cls: type[Any], data: Any, where: str, prefix: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        at = f"{where}: {prefix.rstrip('.')}" if prefix else where
        raise RecipeError(f"{at}: found {_found(data)}, expected keys and values")
    hints = _fields(cls)
    checked: dict[str, Any] = {}
    for key, value in data.items():
        if key not in hints:
            raise RecipeError(f"{where}: {prefix}{key}: unknown key, {_nearest(str(key), hints)}")
        entry_hint = _entry_of(hints[key])
        section = _section_of(hints[key])
        if section is not None and (value is not None or section is hints[key]):
            checked[key] = _check_section(section, value, where, f"{prefix}{key}.")
        elif entry_hint is not None:
            if not isinstance(value, (list, tuple)):
                found, right = _found(value), _describe(hints[key])
                raise RecipeError(f"{where}: {prefix}{key}: found {found}, expected {right}")
            checked[key] = [
                _check_section(entry_hint, entry, where, f"{prefix}{key}[{i}].")
                for i, entry in enumerate(value)
            ]
        else:
            checked[key] = _check(value, hints[key], f"{where}: {prefix}{key}")
    return checked


def _check(value: Any, hint: Any, where: str) -> Any:
    """The value as its field's type.

    An int is a float too, and so is text like 1e-5, which YAML 1.1 does not read as a number.
    """
    hint, optional = _without_none(hint)
    origin = typing.get_origin(hint)
    wrong = RecipeError(f"{where}: found {_found(value)}, expected {_describe(hint, optional)}")
    if value is None and optional:
        return None
    if origin is Literal:
        for allowed in typing.get_args(hint):
            if type(value) is type(allowed) and value == allowed:
                return value
        raise wrong
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise wrong
        item = typing.get_args(hint)[0]
        return tuple(_check(v, item, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is Mapping:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise wrong
        return value
    if hint is float:
        if isinstance(value, str) and _NUMBER.fullmatch(value):
            value = float(value)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            raise wrong
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    # bool is a subclass of int; True is no seed.
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise wrong
    return value


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def _from_text(given: Any, hint: Any, where: str) -> Any:
    """A flag's text (or list of texts, or bool) as its field's type."""
    base, optional = _without_none(hint)
    if isinstance(given, list):
        item = typing.get_args(base)[0]
        return tuple(_from_text(text, item, f"{where}[{i}]") for i, text in enumerate(given))
    value = given
    if isinstance(given, str):
        if optional and given.lower() in ("none", "null"):
            return None
        allowed = typing.get_args(base) if typing.get_origin(base) is Literal else ()
        value = next((a for a in allowed if str(a) == given), given)
        if base is int and re.fullmatch(r"[+-]?\d+", given):
            value = int(given)
    return _check(value, hint, where)


def _without_none(hint: Any) -> tuple[Any, bool]:
    """`X | None` as (X, True), anything else as (hint, False)."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint, False
    rest = [a for a in typing.get_args(hint) if a is not type(None)]
    if len(rest) != 1:
        raise TypeError(f"recipes cannot hold {hint}: more than one type besides None")
    return rest[0], True


_NAMES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    Path: "a path",
}


def _describe(hint: Any, optional: bool = False) -> str:
    hint, none = _without_none(hint)
    if typing.get_origin(hint) is Literal:
        text = "one of " + ", ".join(str(a) for a in typing.get_args(hint))
    elif typing.get_origin(hint) is tuple:
        text = f"a list, each {_describe(typing.get_args(hint)[0])}"
    else:
        text = _NAMES.get(hint) or "keys and values"
    return f"{text} or null" if none or optional else text


def _found(value: Any) -> str:
    if isinstance(value, dict):
        return "keys and values"
    return "nothing" if value is None else repr(value)


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    if not known:
        return "this has no settings"
    return f"the nearest known one is {difflib.get_close_matches(name, known, 1, 0.0)[0]!r}"


def _unknown_flag(found: str, parser: argparse.ArgumentParser) -> str:
    if not found.startswith("-"):
        return f"unexpected argument {found!r}"
    known = dict.fromkeys(parser._option_string_actions)
    return f"{found.split('=')[0]}: unknown flag, {_nearest(found.split('=')[0], known)}"


def _add_flags(
    group: argparse._ArgumentGroup, parser: argparse.ArgumentParser, cls: type[Any], prefix: str
) -> None:
    helps = _field_lines(cls)
    defaults = {f.name: f.default for f in dataclasses.fields(cls)}
    sections, lists = [], []
    for name, hint in _fields(cls).items():
        if _section_of(hint) is not None:
            sections.append((name, _section_of(hint)))
            continue
        if _entry_of(hint) is not None:
            lists.append((name, _entry_of(hint)))
            continue
        base, _ = _without_none(hint)
        if typing.get_origin(base) is Mapping:
            continue
        default = defaults[name]
        told = default is not dataclasses.MISSING and not isinstance(default, bool)
        shown = f" (default: {default})" if told else ""
        flag = f"--{prefix}{name}"
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": f"{prefix}{name}"}
        options["help"] = (helps.get(name, "") + shown).replace("%", "%%").strip() or None
        if base is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["metavar"] = _metavar(base)
            if typing.get_origin(base) is tuple:
                options["nargs"] = "*"
        # A hyphen is what fingers type; the field's own name works as well.
        spellings = dict.fromkeys([flag.replace("_", "-"), flag])
        group.add_argument(*spellings, **options)
    for name, section in sections:
        title = f"{prefix}{name}" + (f": {helps[name].rstrip('.')}" if name in helps else "")
        _add_flags(parser.add_argument_group(title), parser, section, f"{prefix}{name}.")

    for name, entry in lists:
        keys = ", ".join(_fields(entry))
        parser.add_argument_group(
            f"{prefix}{name}" + (f": {helps[name].rstrip('.')}" if name in helps else ""),
            f"a list in the recipe's file, each entry with some of: {keys}".replace("%", "%%"),
        )


def _metavar(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "{" + ",".join(str(a) for a in typing.get_args(hint)) + "}"
    if typing.get_origin(hint) is tuple:
        return _metavar(typing.get_args(hint)[0])
    return {int: "N", float: "X", Path: "PATH"}.get(hint, "TEXT")


def _field_lines(cls: type[Any]) -> dict[str, str]:
    """Field name → its text in the "Args:" of the docstring, or of a class it inherits from."""
    lines: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        lines |= _own_lines(base)
    return lines


def _own_lines(cls: type[Any]) -> dict[str, str]:
    """The texts of one docstring; "a, b: text" is for both."""
    lines: dict[str, str] = {}
    names: list[str] = []
    # cleandoc: Python 3.13 strips a docstring's indentation, earlier ones keep it.
    _, _, rest = inspect.cleandoc(cls.__doc__ or "").partition("Args:\n")
    for line in rest.splitlines():
        if line.strip() and not line.startswith(" " * 4):
            break
        entry = re.match(r" {4}(\w+(?:, \w+)*): (.*)", line)
        if entry:
            names = entry[1].split(", ")
            lines.update(dict.fromkeys(names, entry[2].strip()))
        elif line.strip():
            lines.update({name: f"{lines[name]} {line.strip()}" for name in names})
    return lines
