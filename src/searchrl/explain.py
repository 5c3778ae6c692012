"""What Hydra and OmegaConf refuse, said in words of the command line: which override, why, what to write.

Their own messages speak of defaults lists, schemas and search paths. What is recognised here is told anew;
anything else is passed on, its causes included.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from searchrl.errors import did_you_mean, nearest

_WANTED = {
    "Integer": "a whole number",
    "Float": "a number",
    "String": "text",
}
"""By OmegaConf's name of a type: what a value of it looks like."""

_GROUP = re.compile(
    r"Could not find '(?P<group>.+)/(?P<option>[^/']+)'\s+Available options in '.+':\s(?P<rest>.*)", re.S
)
_TYPE = re.compile(r"Value '?(?P<value>.*?)'? of type '.+' could not be converted to (?P<type>\w+)", re.S)
_BOOL = re.compile(r"Value '(?P<value>.*)' is not a valid bool")
_ENUM = re.compile(r"Invalid value '.*', expected one of \[(?P<options>.*)\]")

_THERE_ALREADY = re.compile(
    r"(?:already at '|Multiple values for |^)(?P<key>[\w.]+)(?:'?\.| appears more than once)"
)


def explain(error: Exception, overrides: Sequence[str], known: Sequence[str]) -> str:
    """What is wrong with ``overrides``, a message of one line where the reason is known.

    Args:
        error: Hydra's, OmegaConf's, or the AttributeError of a key that a schema does not have.
        overrides: as they were typed.
        known: all keys that there are, dotted.
    """
    whole = "\n".join(_causes(error))
    if (unread := _unreadable(overrides)) is not None:
        return unread
    if group := _GROUP.search(whole):
        return _no_option(group["group"], group["option"], group["rest"])
    unknown = [key for override in overrides if (key := _key(override)) and not _is_known(key, known)]
    if unknown:
        return "\n".join(_no_key(key, known) for key in unknown)
    for override in overrides:
        bare = override.lstrip("+")
        if whole.startswith(f"Error merging override {override}"):
            return f"{override}: {_no_value(whole)}"
        if bare.startswith("experiment=") and "No match in the defaults list" in whole:
            return f"{override} needs a plus, because there need not be an experiment: write +{bare}"
        if override == bare and ".kwargs." in _key(bare):
            return f"{override} needs a plus, because it is an argument of your own: write +{override}"
        if (
            override.startswith("+")
            and (there := _THERE_ALREADY.search(whole))
            and there["key"] == _key(bare)
        ):
            return f"{override} needs no plus, because there is a value to replace: write {bare}"
        if f"Ambiguous value for argument '{override}'" in whole:
            return f"{override} names several values; a list is written [A,B], text with commas in quotes"
    return whole


def _causes(error: Exception) -> list[str]:
    """The error's text, and the first line of each cause that says more."""
    said = [re.sub(r"\s*full_key: (\S+)(\s*object_type=.*)?", r", in \1", str(error)).strip()]
    cause = error.__cause__
    while cause is not None:
        line = str(cause).strip().partition("\n")[0]
        if line not in said[0]:
            said.append(line)
        cause = cause.__cause__
    return said


def _unreadable(overrides: Sequence[str]) -> str | None:
    """What is said of the first override that is no key=value."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    for override in overrides:
        try:
            parser.parse_override(override)
        except HydraException:
            if "=" not in override:
                return f"{override!r} is no setting; write key=value, for example steps=10"
            return (
                f"{override!r} cannot be read; a list is written [A,B], and text with brackets, braces, "
                "quotes, commas or equals signs in quotes of its own, inside those of the shell: "
                "'name=\"a, b\"'"
            )
    return None


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0].partition("@")[0]


def _is_known(key: str, known: Sequence[str]) -> bool:
    free = key.rpartition(".")[0].endswith(".kwargs")  # a custom function's own arguments
    return key in known or free or key == "experiment"


def _no_key(key: str, known: Sequence[str]) -> str:
    hint = did_you_mean(key, [*known, "experiment"]) or "; `searchrl config` lists all"
    return f"unknown key {key!r}{hint}"


def _no_option(group: str, option: str, rest: str) -> str:
    """``rest``: Hydra's list of options, one a line behind a tab, and what it says after it."""
    options = [line.strip() for line in rest.splitlines() if line.startswith("\t") and "=" not in line]
    near = nearest(option, options)
    hint = f"did you mean {near}? There are" if near else "there are"
    return f"there is no {group}={option}; {hint} {', '.join(options)}"


def _no_value(whole: str) -> str:
    """Why a value cannot be what its key needs; ``whole`` is OmegaConf's message."""
    if (found := _TYPE.search(whole)) and found["type"] in _WANTED:
        wanted = _WANTED[found["type"]]
        return f"{found['value']!r} is not {wanted}" if found["value"] else f"no value; give {wanted}"
    if found := _BOOL.search(whole):
        return f"{found['value']!r} is not true or false"
    if "is not Optional" in whole:
        return "it cannot be left empty"
    if found := _ENUM.search(whole):
        return f"choose one of {found['options']}"
    if "is not a ListConfig, list or tuple" in whole:
        return "it takes a list; write [A] or [A,B], in quotes for the shell"
    if "is not a subclass of" in whole:
        return "it is a section of settings; set one of them, for example optimizer.lr=1e-6"
    return whole.partition("\n")[2]
