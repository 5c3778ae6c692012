"""Keys belong into the environment: a configuration is written down, in the run directory and elsewhere."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any
from urllib.parse import urlsplit

from searchrl.config import Config

_NAME = re.compile(r"(^|_)(api_?key|access_?key|token|secret|password|passwd|credentials?)$", re.IGNORECASE)
"""Names of settings, of arguments in addresses and of variables whose values are secret."""

_SHAPES = re.compile(
    r"\b(sk-(?=[\w-]*\d)[\w-]{16,}|hf_\w{16,}|gh[pousr]_\w{16,}|github_pat_\w{16,}|xox[abpr]-[\w-]{10,}|AKIA[0-9A-Z]{16}"
    r"|AIza[\w-]{30,}|ya29\.[\w-]{16,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+|BSA[\w-]{24,})"
    r"|(?<![\w/.-])[0-9a-f]{40}(?![\w/.-])|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
"""OpenAI and its likes, Hugging Face, GitHub, Slack, AWS, Google, JSON web tokens, Brave; forty hexadecimal
digits that stand alone are a key of Weights & Biases or serper.dev (in a path, a hub's commit)."""

_MIN_LENGTH = 8
"""Shorter values of variables, such as the "k" of a test, may stand in a configuration by chance."""


def secret_problems(cfg: Config) -> Iterator[str]:
    """Settings that hold a key, a sentence each; no value is shown."""
    known = {
        value: name for name, value in os.environ.items() if _NAME.search(name) and len(value) >= _MIN_LENGTH
    }
    for name, value in _strings("", cfg):
        variable = next((known[secret] for secret in known if secret in value), None)
        if variable is not None:
            yield f"{name} holds the value of the environment variable {variable}; {_REMEDY}"
        elif _SHAPES.search(value) or (value and _NAME.search(name.rpartition(".")[2])):
            yield f"{name} looks like a key or a password; {_REMEDY}"
        elif _in_address(value):
            yield f"{name} is an address with a password or a key in it; {_REMEDY}"


_REMEDY = (
    "configurations are written to disk and logs, so keys are read from the environment only (JUDGE_API_KEY, "
    "SERPER_API_KEY, BRAVE_API_KEY, MCP_TOKEN, SEARCHRL_RETRIEVAL_TOKEN, WANDB_API_KEY, HF_TOKEN)"
)


def _in_address(value: str) -> bool:
    if "://" not in value:
        return False
    try:
        address = urlsplit(value)
    except ValueError:
        return False  # no address: other checks say so
    names = [part.partition("=")[0] for part in address.query.split("&")]
    return address.password is not None or any(_NAME.search(name) or name == "key" for name in names)


def _strings(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Every text of a configuration by its dotted key, those in lists and ``kwargs`` included."""
    prefix = f"{name}." if name else ""
    if is_dataclass(value):
        for entry in fields(value):
            yield from _strings(prefix + entry.name, getattr(value, entry.name))
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _strings(prefix + str(key), part)
    elif isinstance(value, str):
        yield name, value
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from _strings(f"{name}[{number}]", part)
