"""The mark of errors whose message is all that a user needs: what is wrong, with which value, what to do."""

from __future__ import annotations


class SearchrlError(Exception):
    """Shown without a traceback by the command line. Mixed into the package's public errors."""
