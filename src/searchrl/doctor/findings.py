"""What a check found, in one form for all."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """How a check went."""

    OK = "ok"
    WARNING = "warning"
    """The run works, but worse than it could, or than one may think."""
    FAILED = "failed"
    """The run would fail."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Finding:
    """One thing that a check found."""

    check: str
    status: Status
    text: str
    remedy: str = ""
    """What to do; always there unless the check is ok, or its text says so already."""

    def __str__(self) -> str:
        """Aligned with others; the remedy stands on a line of its own."""
        margin = " " * 24
        lines = f"{self.status:<9}{self.check:<15}{self.text}".splitlines()
        if self.remedy:
            lines.append(f"-> {self.remedy}")
        return "\n".join([lines[0], *(margin + line for line in lines[1:])])


def ok(check: str, text: str) -> Finding:
    """Nothing to do."""
    return Finding(check=check, status=Status.OK, text=text)


def warning(check: str, text: str, remedy: str) -> Finding:
    """Worth knowing."""
    return Finding(check=check, status=Status.WARNING, text=text, remedy=remedy)


def failed(check: str, text: str, remedy: str = "") -> Finding:
    """In the way of the run."""
    return Finding(check=check, status=Status.FAILED, text=text, remedy=remedy)
