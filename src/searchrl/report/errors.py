"""What stops a report."""

from __future__ import annotations

from searchrl.errors import SearchrlError


class ReportError(SearchrlError, ValueError):
    """There is nothing that a report could be made of. The message names the path and what to do."""
