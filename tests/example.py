"""What tests know of ``examples/``."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = (ROOT / "examples" / "custom.py").read_text(encoding="utf-8")


def custom_overrides() -> list[str]:
    """The overrides of the command in the example's docstring; experiment and name come first."""
    command = re.search(r"searchrl train (.*?)\n\n", SOURCE, re.DOTALL)
    assert command is not None
    return shlex.split(command[1].replace("\\\n", " "))
