"""The mark of errors whose message is all that a user needs: what is wrong, with which value, what to do."""

from __future__ import annotations


class SearchrlError(Exception):
    """Shown without a traceback by the command line. Mixed into the package's public errors."""

    exit_code = 1
    """What the command ends with."""


class CleanStop(SearchrlError, RuntimeError):  # noqa: N818  # it need not be an error
    """Ends a run between two steps. Nothing is broken: what was trained so far is saved first."""


def explanation(raised: Exception) -> SearchrlError | None:
    """The error itself, or the first in its groups, that explains itself; None if none does.

    What an episode raises comes out of the task groups that it runs in.
    """
    match raised:
        case SearchrlError():
            return raised
        case ExceptionGroup(exceptions=parts):
            return next(filter(None, map(explanation, parts)), None)
        case _:
            return None
