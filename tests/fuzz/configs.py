"""Malformed configurations: real keys with values of the wrong type or range, wrong keys, broken grammar.

Each is composed by Hydra and checked, as ``searchrl train`` does before it loads anything. What may come out
is a ``ConfigError`` that names the key or the value, or a configuration that says what was asked for and can
be meant.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from random import Random
from typing import Any

from searchrl.compose import load_config
from searchrl.config import Config, ConfigError
from searchrl.errors import SearchrlError

BASE = ("+experiment=smoke",)
NEVER: dict[str, tuple[str, ...]] = {
    "int": ("many", "[1]", "{a: 1}", "null", "true", "1.5", "nan", "inf", "''", "1_", "0x10", "--1", "1e3"),
    "float": ("high", "[1.0]", "{a: 1}", "null", "true", "nan", "''", "1.0.0", "0x1p3", "1;2"),
    "bool | str": ("maybe", "[true]", "{a: 1}", "null", "1.5", "''", "truth"),
    "bool": ("maybe", "[true]", "{a: 1}", "null", "1.5", "''", "truth"),
    "str": ("[a]", "{a: b}", "null"),
    "enum": ("nonsense", "''", "null", "[x]", "{a: 1}", "true", "-1", "1.5"),
    "tuple": ("x", "5", "{a: 1}", "null", "true", "[[1]]", "[null]", "[{a: 1}]"),
    "number | None": ("high", "[1]", "{a: 1}", "nan", "''", "true"),
    "dict": ("x", "5", "[1]", "true", "1.5"),
}
"""Values that a field of a kind can never take. (OmegaConf takes any integer for a truth value.)"""
NUMBERS = (
    *("-1", "-0.5", "-1e-300", "-2147483649", "-9223372036854775809", "-inf", "inf", "1e309", "-1e309"),
    *("0", "1", "2147483648", "18446744073709551616", "1" + "0" * 40, "0.0000001", "1.0", "1e308", "0.99"),
)
TEXTS = ("''", "' '", "🗼", "a/../../b", "'a: b'", "'a\nb'", '"a\tb"', "..", "/", "~", "http://[", "-")
JUNK = (
    *("=", "[", "]", "{", "}", "${", "}", "'", '"', ",", "\\", "+", "~", "@", ":", " ", "\n", "🗼", "*", "("),
    *(
        ")",
        "steps",
        "name",
        "choice(",
        "range(1,3)",
        "glob(*)",
        "int(",
        "${steps}",
        "${oc.env:NOBODY}",
        "???",
    ),
)
GROUPS = ("model", "data", "retrieval", "reward", "advantage", "loss", "importance", "logger", "experiment")
ADDRESSES = (
    *(
        "http://",
        "http://[",
        "http:///p",
        "http://h:99999",
        "http://h:x",
        "http://a b",
        "ftp://h",
        "h:1",
        "//h",
    ),
)
ADDRESSED = (
    ("retrieval=http", "retrieval.urls=['{}']"),
    ("retrieval=searxng", "retrieval.web.url='{}'"),
    ("retrieval=mcp", "retrieval.web.url='{}'"),
    ("retrieval=brave", "retrieval.web.proxy='{}'"),
    ("reward=judge", "reward.judge={{model: m, url: '{}'}}"),
)
MAY_BE_INFINITE = ("importance.hi", "importance.rejection.hi")
UNUSED = ("retrieval.web.", "reward.judge.")
"""Sections of what the base configuration does not use: there, only numbers are looked at that are none."""


@dataclass(frozen=True)
class Leaf:
    """A field that holds a value."""

    key: str
    kind: str
    members: tuple[str, ...] = ()
    """Of an enum."""


def leaves(schema: Any = Config, prefix: str = "") -> Iterator[Leaf]:
    """Every field of the schema that is no section."""
    hints = typing.get_type_hints(schema)
    for entry in fields(schema):
        kind = hints[entry.name]
        if is_dataclass(kind):
            yield from leaves(kind, f"{prefix}{entry.name}.")
        elif isinstance(kind, type) and issubclass(kind, StrEnum):
            yield Leaf(prefix + entry.name, "enum", tuple(kind.__members__))
        elif typing.get_origin(kind) is types.UnionType:
            kinds = "bool | str" if str in typing.get_args(kind) else "number | None"
            yield Leaf(prefix + entry.name, kinds)
        elif typing.get_origin(kind) in (tuple, dict):
            yield Leaf(prefix + entry.name, typing.get_origin(kind).__name__)
        else:
            yield Leaf(prefix + entry.name, kind.__name__)


LEAVES = tuple(leaves())
NUMERIC = tuple(leaf for leaf in LEAVES if leaf.kind in ("int", "float", "number | None"))


@dataclass(frozen=True)
class Malformed:
    """Overrides of which at least one is suspicious."""

    overrides: tuple[str, ...]
    must_fail: bool
    """No reading of it makes sense."""
    names: tuple[str, ...] = ()
    """Of which a refusal names at least one."""
    asked: tuple[str, str] | None = None
    """Key and value of a plain number, which an accepted configuration must hold."""


def make_malformed(random: Random) -> Malformed:
    """A configuration that somebody got wrong."""
    makers = (
        *(_wrong_type, _wrong_type, _out_of_range, _out_of_range, _odd_text, _unknown_key, _no_option),
        *(_no_address, _junk),
    )
    return random.choice(makers)(random)


def _override(key: str, value: str, **more: Any) -> Malformed:
    section = key.rpartition(".")[0] or key  # what is wrong may be that the section is not used
    return Malformed((f"{key}={value}",), names=(key, section, value.strip("'\"") or key), **more)


def _wrong_type(random: Random) -> Malformed:
    leaf = random.choice(LEAVES)
    value = random.choice(NEVER[leaf.kind])
    if leaf.kind == "enum" and random.random() < 0.5:
        value = _misspelt(random, random.choice(leaf.members))
    return _override(leaf.key, value, must_fail=value not in leaf.members)


def _out_of_range(random: Random) -> Malformed:
    leaf = random.choice(NUMERIC)
    value = random.choice(NUMBERS)
    return _override(leaf.key, value, must_fail=False, asked=(leaf.key, value))


def _odd_text(random: Random) -> Malformed:
    leaf = random.choice([leaf for leaf in LEAVES if leaf.kind in ("str", "tuple", "enum")])
    value = random.choice(TEXTS)
    value = f"[{value}]" if leaf.kind == "tuple" else value
    return Malformed((f"{leaf.key}={value}",), must_fail=leaf.kind == "enum")


def _unknown_key(random: Random) -> Malformed:
    leaf = random.choice([leaf for leaf in LEAVES if leaf.kind != "dict"])
    *sections, name = leaf.key.split(".")
    where = random.randint(0, len(sections))
    parts = [*sections, name]
    parts[where] = _misspelt(random, parts[where])
    if random.random() < 0.2:
        parts.append(_misspelt(random, name))  # below a value
    key = ".".join(parts)
    sign = random.choice(("", "+", "++", "~"))
    known = key in {leaf.key for leaf in LEAVES}
    override = f"{sign}{key}" if sign == "~" else f"{sign}{key}=1"
    return Malformed((override,), must_fail=not known, names=(key, parts[where], parts[-1]))


def _no_option(random: Random) -> Malformed:
    group = random.choice(GROUPS)
    option = random.choice(("nonsense", "../smoke", "a/b", "[a", "tiny@x", "null,x"))
    sign = random.choice(("", "+"))
    return Malformed((f"{sign}{group}={option}",), must_fail=True, names=(group, option))


def _no_address(random: Random) -> Malformed:
    group, override = random.choice(ADDRESSED)
    url = random.choice(ADDRESSES)
    return Malformed((group, override.format(url)), must_fail=True, names=(url,))


def _junk(random: Random) -> Malformed:
    text = "".join(random.choice(JUNK) for _ in range(random.randint(1, 6)))
    if random.random() < 0.5:
        text = f"{random.choice(LEAVES).key}={text}"
    return Malformed((text,), must_fail=False)


def _misspelt(random: Random, name: str) -> str:
    """One letter dropped, doubled, changed or swapped, or the wrong case."""
    at = random.randrange(len(name))
    spellings = (
        name[:at] + name[at + 1 :] or "x",
        name[:at] + name[at] + name[at:],
        name[:at] + "q" + name[at + 1 :],
        name[: at + 1][::-1] + name[at + 1 :],
        name.upper(),
        name + "s",
    )
    return random.choice([spelling for spelling in spellings if spelling != name])


def check_config(malformed: Malformed) -> str:
    """Compose and check it; returns ``refused`` or ``accepted``."""
    try:
        cfg, _ = load_config([*BASE, *malformed.overrides])
    except ConfigError as error:
        message = str(error)
        assert message.strip()
        assert "Traceback" not in message
        assert not malformed.names or any(name in message for name in malformed.names), message
        return "refused"
    except SearchrlError as error:
        raise AssertionError(f"not a ConfigError but {error!r}") from error
    assert not malformed.must_fail, "accepted"
    for key, value in _values(cfg):
        check_value(key, value)
    if malformed.asked is not None:
        key, text = malformed.asked
        assert float(dict(_values(cfg))[key]) == float(text), "another value than was asked for"
    return "accepted"


def _values(cfg: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for entry in dataclasses.fields(cfg):
        value = getattr(cfg, entry.name)
        if is_dataclass(value):
            yield from _values(value, f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name, value


def check_value(key: str, value: object) -> None:
    """What no setting of a run that can be meant holds."""
    numbers: Sequence[object] = value if isinstance(value, tuple | list) else [value]
    for number in numbers:
        if isinstance(number, int | float):
            assert math.isfinite(number) or key in MAY_BE_INFINITE, f"{key}={number}"
            assert number >= 0 or key.startswith(UNUSED), f"{key}={number}"
            assert abs(number) < 2**32 or isinstance(number, float), f"{key}={number}"
        assert number is value or isinstance(number, str | int | float), f"{key} holds {number!r}"
    if key in ("name", "run_dir"):
        assert str(value).strip(), key
