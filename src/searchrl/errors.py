"""The mark of errors whose message is all that a user needs: what is wrong, with which value, what to do."""

from __future__ import annotations

import errno

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
    """Message and exit code of an error that needs no traceback; None: it does."""
    if isinstance(error, SearchrlError):
        return str(error), error.exit_code
    if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE and error.filename is not None:
        return f"{error.filename}: {error.strerror}; give this user access or room there, or name another", 1
    return None
