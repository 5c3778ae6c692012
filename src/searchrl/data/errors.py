"""The one error type of ``searchrl.data``."""

from __future__ import annotations

from searchrl.errors import InputError


class DataError(InputError, ValueError):
    """A data set, package or row is missing or wrong. The message names it and says what to do."""
