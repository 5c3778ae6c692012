"""The mark of errors whose message is all that a user needs: what is wrong, with which value, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SearchrlError(Exception):
    """Shown without a traceback by the command line. Mixed into the package's public errors."""

    exit_code = 1
    """What the command ends with."""


class CleanStop(SearchrlError, RuntimeError):  # noqa: N818  # it need not be an error
    """Ends a run between two steps. Nothing is broken: what was trained so far is saved first."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown ``name``: the nearest known one, or nothing if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
