"""The site over these pages: `make docs` builds it, and fails on a link or an anchor that leads nowhere.

The pages also read well where a code host shows them. There, links lead on to source files, examples and the
README; on the site, which has no page for those, they become the file's name.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx
from sphinx.errors import SphinxError

DOCS = Path(__file__).resolve().parent

project = "searchrl"
author = "the authors of searchrl"
extensions = ["myst_parser"]
html_theme = "furo"
html_title = "searchrl"
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False
nitpicky = True
myst_heading_anchors = 4  # made of headings as code hosts make them, so that a link works on both


def _name_files_outside(_app: Sphinx, page: str, source: list[str]) -> None:
    """Make names of links that lead out of this folder.

    Raises:
        SphinxError: such a link leads to no file.
    """

    def name(link: re.Match[str]) -> str:
        text, target = link.groups()
        file = (DOCS / page).parent.joinpath(target.partition("#")[0]).resolve()
        if file.is_relative_to(DOCS):
            return link.group()
        if not file.exists():
            raise SphinxError(f"docs/{page}.md links to {target}, which does not exist")
        shown = str(file.relative_to(DOCS.parent))
        return f"`{shown}`" if text.strip("`") == shown else f"{text} (`{shown}`)"

    source[0] = re.sub(r"\[([^\]]+)\]\((\.\./[^)\s]+)\)", name, source[0])


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("source-read", _name_files_outside)
    app.add_lexer("mermaid", TextLexer)  # curves that code hosts draw; here their numbers are shown
    return {"parallel_read_safe": True, "parallel_write_safe": True}
