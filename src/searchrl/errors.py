"""The mark of errors whose message is all that a user needs: what is wrong, with which value, what to do."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable

_OF_THE_MACHINE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
"""No permission, a file system that is read-only, none of it left: never a bug, wherever it happens."""


class SearchrlError(Exception):
    """Shown without a traceback by the command line. Mixed into the package's public errors."""

    exit_code = 1
    """What the command ends with."""


class InputError(SearchrlError):
    """What the user gave cannot be used; it is found before anything is trained."""

    exit_code = 2


class MissingPackageError(InputError, ImportError):
    """A package that comes with an extra is not installed."""


class CleanStop(SearchrlError, RuntimeError):  # noqa: N818  # it need not be an error
    """Ends a run between two steps. Nothing is broken: what was trained so far is saved first."""


def own_words(error: Exception) -> tuple[str, int] | None:
    """Message and exit code of an error that needs no traceback, or of the first such in its groups.

    None: there is none, and a traceback is needed. Groups come from the tasks that episodes run in.
    """
    match error:
        case SearchrlError():
            return str(error), error.exit_code
        case ExceptionGroup(exceptions=parts):
            return next(filter(None, map(own_words, parts)), None)
        case OSError(errno=number, filename=str(name)) if number in _OF_THE_MACHINE:
            return f"{name}: {error.strerror}; give this user access or room there, or name another", 1
        case _:
            return None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown ``name``: the nearest known one, or nothing if none is near."""
    near = nearest(name, known)
    return f"; did you mean {near!r}?" if near else ""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that ``name`` was probably meant to be; None if none is near."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)
