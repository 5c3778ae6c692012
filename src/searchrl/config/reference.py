"""What can be set, read from the schema itself: every field with its type, default and docstring.

Docstrings below fields are no part of a class at run time, so they are read from the source, which a wheel
carries as well. Nothing here needs Hydra.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from searchrl.config.schema import Config


@dataclass(kw_only=True, slots=True, frozen=True)
class Setting:
    """One value that can be set."""

    key: str
    """Dotted, as on the command line: ``optimizer.lr``."""
    type: str
    """In words; of an enumeration, its options: ``cpu | cuda``."""
    default: str
    """As it would be written on the command line."""
    meaning: str
    """The field's docstring, as one paragraph."""
    options: Mapping[str, str]
    """Of an enumeration, each option's docstring, which may be empty; of anything else, none."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Section:
    """Settings that belong together: a class of the schema."""

    key: str
    """Dotted: ``model.lora``; empty: the settings that stand in no section."""
    meaning: str
    settings: tuple[Setting, ...]
    """Without those of sections inside it."""


def sections() -> list[Section]:
    """All sections, in the schema's order, each before those inside it."""
    return _sections(Config(), "", "")


def known_keys() -> list[str]:
    """Every dotted key, those of sections included."""
    found = sections()
    keys = [section.key for section in found if section.key]
    return keys + [setting.key for section in found for setting in section.settings]


def group_options(folder: Path) -> dict[str, dict[str, str]]:
    """What stands ready to be chosen: by group its options, and the first sentence of each file's comment.

    Args:
        folder: of the YAML files.
    """
    found: dict[str, dict[str, str]] = {}
    for path in sorted(folder.glob("*/*.yaml")):
        found.setdefault(path.parent.name, {})[path.stem] = _first_comment(path.read_text(encoding="utf-8"))
    return found


def written(value: Any) -> str:
    """A value as it would be written on the command line."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case list() | tuple():
            return f"[{','.join(written(item) for item in value)}]"
        case Mapping():
            return "{" + ",".join(f"{key}:{written(item)}" for key, item in value.items()) + "}"
        case "":
            return "''"
        case _:
            return str(value)


def first_sentence(text: str) -> str:
    """Up to the first full stop that ends a sentence."""
    return re.split(r"(?<=\.)(?<!\bDr\.)\s+(?=[A-Z`(])", text, maxsplit=1)[0]


def _sections(section: Any, key: str, meaning: str) -> list[Section]:
    """The section, an instance with its defaults, and those inside it."""
    prefix = f"{key}." if key else ""
    documented, hints = _field_docs(type(section)), get_type_hints(type(section))
    settings, inner = [], []
    for entry in fields(section):
        value, doc = getattr(section, entry.name), documented.get(entry.name, "")
        if is_dataclass(value):
            inner += _sections(value, prefix + entry.name, doc)
        else:
            settings.append(_setting(prefix + entry.name, hints[entry.name], value, doc))
    about = f"{_paragraph(inspect.getdoc(type(section)) or '')} {meaning}".strip()
    return [Section(key=key, meaning=about, settings=tuple(settings)), *inner]


def _setting(key: str, hint: Any, value: Any, doc: str) -> Setting:
    options: dict[str, str] = {}
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        documented = _field_docs(hint)
        options = {str(member): documented.get(member.name, "") for member in hint}
    return Setting(key=key, type=_type(hint), default=written(value), meaning=doc, options=options)


def _type(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is UnionType:
        return " | ".join(_type(part) for part in arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"list of {_type(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(_type(part) for part in arguments)}]"
    if origin is dict:
        return "mapping"
    if hint is NoneType:
        return "null"
    if issubclass(hint, StrEnum):
        return " | ".join(hint)
    return str(hint.__name__)


def _field_docs(schema: type) -> dict[str, str]:
    """The strings below the fields of a class, or below the members of an enumeration, by name."""
    definition = _definitions(schema.__module__)[schema.__name__]
    found = {}
    for here, below in zip(definition.body, definition.body[1:], strict=False):
        target: ast.expr | None = None
        if isinstance(here, ast.AnnAssign):
            target = here.target
        elif isinstance(here, ast.Assign):
            (target,) = here.targets
        if isinstance(target, ast.Name) and isinstance(below, ast.Expr):
            found[target.id] = _paragraph(str(ast.literal_eval(below.value)))
    return found


@cache
def _definitions(module: str) -> Mapping[str, ast.ClassDef]:
    """The classes of a module, as they are written."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _paragraph(doc: str) -> str:
    """As one line; code is marked as Markdown does."""
    return " ".join(doc.replace("``", "`").split())


def _first_comment(yaml: str) -> str:
    """The first sentence of the comment at a file's top, after lines for Hydra and commands to type."""
    lines = []
    for line in yaml.splitlines():
        if not line.startswith("#"):
            break
        text = line.removeprefix("#").strip()
        if not (text.startswith("@") or re.match(r"(\w+=\S+ )?searchrl \w+ ", text)):
            lines.append(text)
    return first_sentence(" ".join(lines))
