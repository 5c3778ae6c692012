"""``searchrl config``: what can be set, what it means, and what a run would use."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from searchrl.compose import compose_config, config_folder
from searchrl.config import ConfigError
from searchrl.config.reference import Section, Setting, first_sentence, group_options, sections, written
from searchrl.errors import did_you_mean

_DESCRIPTION = """\
Show what can be set.

  searchrl config                               sections, and what stands ready to be chosen
  searchrl config optimizer                     the settings of a section, with type, default and meaning
  searchrl config optimizer.lr                  one setting
  searchrl config experiment                    the options of a group, or all experiments
  searchrl config +experiment=quickstart        what a run with these overrides would use
  searchrl config +experiment=quickstart model  of that, one section
"""

_MARK = "<!-- From here on written by `searchrl config --markdown docs/configuration.md`. -->\n"
_SHORT = 60
"""Characters of a default in a table."""


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Raises:
        ConfigError: there is nothing of a given name, or the overrides cannot be composed.
    """
    parser = argparse.ArgumentParser(
        prog="searchrl config",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="*", metavar="KEY|OVERRIDE", help="what has a = is an override")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="renew the reference in FILE, below its introduction"
    )
    given = parser.parse_args(argv)
    if given.markdown is not None:
        from searchrl.data.files import replacing

        renewed = renew(given.markdown.read_text(encoding="utf-8"))
        with replacing(given.markdown) as fresh:
            fresh.write_text(renewed, encoding="utf-8")
        return
    overrides = [word for word in given.words if "=" in word or word.startswith("~")]
    names = [word for word in given.words if word not in overrides]
    width = min(shutil.get_terminal_size(fallback=(110, 24)).columns, 110)
    if overrides:
        lines = _composed(overrides, names)
    elif names:
        lines = (line for name in names for line in _described(name, width))
    else:
        lines = _overview(width)
    print("\n".join(lines))


def renew(document: str) -> str:
    """A document whose part below the mark is written anew; what stands above it is kept.

    Raises:
        ConfigError: there is no mark.
    """
    introduction, mark, _ = document.partition(_MARK)
    if not mark:
        raise ConfigError(f"the file has no line {_MARK.strip()!r}, below which the reference is written")
    return introduction + mark + "\n" + "\n".join(_markdown()) + "\n"


# --- in the terminal ------------------------------------------------------------------------------------


def _overview(width: int) -> Iterator[str]:
    found, options = sections(), group_options(config_folder())
    yield "Settings are written key=value. `searchrl config KEY` explains a section or a setting.\n"
    for section in found:
        if section.key and "." not in section.key:
            yield from _entry(section.key, first_sentence(section.meaning), width)
    yield "\nBy themselves:\n"
    for setting in found[0].settings:
        yield from _entry(setting.key, first_sentence(setting.meaning), width)
    yield "\nReady to be chosen (`searchrl config GROUP` explains them):\n"
    for group, names in options.items():
        plus = "+" if group == "experiment" else ""
        yield from _entry(f"{plus}{group}=", ", ".join(names), width)


def _described(name: str, width: int) -> Iterator[str]:
    """A section with those inside it, a setting, a group; a section may be a group as well."""
    found, options = sections(), group_options(config_folder())
    settings = {setting.key: setting for section in found for setting in section.settings}
    name = name.lstrip("+")
    inside = [one for one in found if one.key and (one.key == name or one.key.startswith(f"{name}."))]
    if name in settings:
        yield from _setting(settings[name], width, whole=True)
    elif not inside and name not in options:
        known = [*settings, *options, *(section.key for section in found if section.key)]
        raise ConfigError(
            f"there is no section, setting or group {name!r}{did_you_mean(name, known)} "
            "(`searchrl config` lists them)"
        )
    for section in inside:
        yield from textwrap.wrap(f"{section.key}: {section.meaning}", width)
        yield ""
        for setting in section.settings:
            yield from _setting(setting, width, whole=False)
        yield ""
    if name in options:
        plus = "+" if name == "experiment" else ""
        yield f"Ready to be chosen with {plus}{name}=OPTION:\n"
        for option, comment in options[name].items():
            yield from _entry(option, comment, width)


def _setting(setting: Setting, width: int, *, whole: bool) -> Iterator[str]:
    default = setting.default.replace("\n", "\\n")
    yield f"  {setting.key}={default if whole else _shortened(default)}  ({setting.type})"
    yield from textwrap.wrap(setting.meaning, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    for option, meaning in setting.options.items():
        if meaning:
            yield from _entry(option, meaning, width, indent=8)


def _entry(name: str, text: str, width: int, *, indent: int = 2) -> list[str]:
    """A name, and beside it a text that wraps."""
    column = indent + 22
    head = f"{'':{indent}}{name:<21} "
    return textwrap.wrap(text, width, initial_indent=head, subsequent_indent=" " * column) or [head]


def _composed(overrides: Sequence[str], names: Sequence[str]) -> Iterator[str]:
    """Every value, those that differ from the defaults marked; ``names``: of these sections and settings."""
    from searchrl.validation.secrets import secret_problems

    cfg, _ = compose_config(overrides)
    if problems := list(secret_problems(cfg)):  # before any value is shown
        raise ConfigError("\n".join(problems))
    values = dict(_leaves(cfg, ""))
    defaults = {setting.key: setting.default for section in sections() for setting in section.settings}
    for name in names:
        if not any(_is_within(key, name) for key in values):
            raise ConfigError(f"there is no section or setting {name!r}{did_you_mean(name, values)}")
    changed = 0
    for key, value in values.items():
        if names and not any(_is_within(key, name) for name in names):
            continue
        differs = value != defaults[key]
        changed += differs
        line = f"{'*' if differs else ' '} {key}={value}".replace("\n", "\\n")
        yield line + (f"   (default: {_shortened(defaults[key])})" if differs else "")
    yield f"\n* differs from the default: {changed} settings"


def _leaves(section: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """Settings first, then sections, as in `sections`."""
    inner = []
    for entry in fields(section):
        value = getattr(section, entry.name)
        if is_dataclass(value):
            inner.append((value, f"{prefix}{entry.name}."))
        else:
            yield prefix + entry.name, written(value)
    for value, below in inner:
        yield from _leaves(value, below)


def _is_within(key: str, name: str) -> bool:
    return key == name or key.startswith(f"{name}.")


def _shortened(text: str) -> str:
    plain = " ".join(text.replace("\\n", " ").split())
    return plain if len(plain) <= _SHORT else plain[: _SHORT - 1] + "…"


# --- as Markdown ----------------------------------------------------------------------------------------


def _markdown() -> Iterator[str]:
    yield "## Ready to be chosen\n"
    yield "An experiment is added with `+experiment=NAME`; an option of a group with `group=NAME`.\n"
    for group, names in group_options(config_folder()).items():
        yield f"### `{'+' if group == 'experiment' else ''}{group}=`\n"
        yield from _table(("option", "meaning"), [(f"`{name}`", comment) for name, comment in names.items()])
    yield "## Settings\n"
    for section in sections():
        yield from _section(section)


def _section(section: Section) -> Iterator[str]:
    yield f"### {f'`{section.key}`' if section.key else 'By themselves'}\n"
    yield f"{section.meaning}\n"
    rows = [
        (
            f"`{setting.key}`",
            ", ".join(f"`{option}`" for option in setting.options) or setting.type,
            f"`{_shortened(setting.default)}`",
            setting.meaning + _options(setting.options),
        )
        for setting in section.settings
    ]
    yield from _table(("key", "type", "default", "meaning"), rows)


def _options(options: Mapping[str, str]) -> str:
    return "".join(f"<br>`{name}`: {meaning}" for name, meaning in options.items() if meaning)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        cells = (cell.replace("|", r"\|") for cell in row)
        yield f"| {' | '.join(cells)} |"
    yield ""
