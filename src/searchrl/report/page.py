"""Writes a report: one file that needs nothing else, or one with a folder of transcripts beside it.

What a model or a document said is hostile text. It reaches the page only inside compressed, base64-encoded
data and is shown as text; and the page's content security policy runs the scripts of this package alone,
by their hashes, and lets nothing be loaded from anywhere.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from searchrl.report.panels import chart_panels
from searchrl.report.rundir import RunReader
from searchrl.report.transcripts import OUTCOMES

INLINE_LIMIT = 64 * 2**20
"""Bytes of encoded transcripts that a page may hold; more stand in a folder beside it, a file a chunk."""

_TRANSCRIPTS = re.compile(r"\d+_\d+-[0-9a-f]{8}\.js")
"""Names of files in that folder."""

SCRIPTS = (
    "dom.js",
    "store.js",
    "charts.js",
    "tables.js",
    "filters.js",
    "transcript.js",
    "browser.js",
    "main.js",
)


def write_report(readers: Sequence[RunReader], out: Path) -> list[Path]:
    """Write the page; returns what was written: the page, and the folder beside it if there is one.

    Args:
        readers: the runs, each refreshed.
        out: the page's path; its folder is made if need be.
    """
    chunks = {
        f"{number}/{name}": chunk
        for number, reader in enumerate(readers)
        for name, chunk in reader.chunks.items()
    }
    beside = out.with_name(f"{out.stem}_transcripts")
    is_split = sum(map(len, chunks.values())) * 4 // 3 > INLINE_LIMIT  # base64 makes four bytes of three
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_transcripts(beside)
    data = encoded(json.dumps(payload(readers), allow_nan=False, separators=(",", ":")).encode())
    partial = out.with_name(f".{out.name}.partial")
    with partial.open("wb") as file:
        file.write(page(title(readers), mode="file", data=data, folder=beside.name if is_split else ""))
        if not is_split:  # behind the scripts: the page is there before its last transcript is read
            for name, chunk in chunks.items():
                file.write(b'<script type="text/plain" id="chunk-%s">' % name.encode())
                file.write(base64.b64encode(chunk) + b"</script>\n")
    if is_split:
        beside.mkdir(exist_ok=True)
        for name, chunk in chunks.items():
            path = beside / f"{name.replace('/', '_')}.js"
            call = b'report.store.deliver("%s","%s");\n' % (name.encode(), base64.b64encode(chunk))
            path.write_bytes(call)
    partial.replace(out)
    return [out, beside] if is_split else [out]


def _remove_transcripts(folder: Path) -> None:
    """Those of an earlier report; what else somebody keeps in a folder of that name stays."""
    ours = [path for path in folder.glob("*.js") if _TRANSCRIPTS.fullmatch(path.name)]
    for path in ours:
        path.unlink()
    if ours and not any(folder.iterdir()):
        folder.rmdir()


def payload(readers: Sequence[RunReader]) -> dict[str, Any]:
    """All that the page shows at once: charts, tables and the index of every run."""
    runs = [reader.data() for reader in readers]
    names = {name for run in runs for name in run["metrics"]}
    nonzero = {name for run in runs for name, values in run["metrics"].items() if any(values)}
    return {
        "panels": chart_panels(names, nonzero, comparing=len(runs) > 1),
        "outcomes": OUTCOMES,
        "runs": [{**run, "name": name} for run, name in zip(runs, run_names(readers), strict=True)],
    }


def run_names(readers: Sequence[RunReader]) -> list[str]:
    """The folders' names, or their paths where names repeat."""
    names = [reader.run_dir.resolve().name for reader in readers]
    return names if len(set(names)) == len(names) else [str(reader.run_dir) for reader in readers]


def title(readers: Sequence[RunReader]) -> str:
    """What the page is called."""
    return ", ".join(run_names(readers))


def page(name: str, *, mode: str, data: bytes = b"", folder: str = "") -> bytes:
    """The page up to the transcripts.

    Args:
        name: its title.
        mode: ``file`` or ``live``.
        data: the encoded payload; empty: the page asks the server for it.
        folder: where transcripts stand beside the page; empty: inside it, or the server has them.
    """
    plotly, plotly_hash = _plotly()
    scripts = {name: _asset(name) for name in SCRIPTS}
    sources = [*map(_hash, scripts.values()), plotly_hash]
    policy = {
        "default-src": "'none'",
        "script-src": " ".join([*sources, *(["'self'", "file:"] if folder else [])]),
        "style-src": "'unsafe-inline'",  # Plotly sets styles as it draws
        "img-src": "data: blob:",  # a chart saved as a picture
        "connect-src": "'self'" if mode == "live" else "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    values: Mapping[str, str] = {
        "policy": "; ".join(f"{key} {value}" for key, value in policy.items()),
        "title": html.escape(name),
        "style": _asset("page.css"),
        "mode": mode,
        "folder": html.escape(folder),
        "plotly": plotly,
        "data": data.decode(),
        "scripts": "\n".join(f"<script>{text}</script>" for text in scripts.values()),
    }
    return Template(_asset("page.html")).substitute(values).encode()


def encoded(content: bytes) -> bytes:
    """Compressed, and in characters that mean nothing to HTML."""
    return base64.b64encode(gzip.compress(content, compresslevel=6, mtime=0))


@cache
def _plotly() -> tuple[str, str]:
    """The library, encoded, and its hash."""
    from plotly.offline import get_plotlyjs

    text = get_plotlyjs()
    return encoded(text.encode()).decode(), _hash(text)


def _asset(name: str) -> str:
    return (files("searchrl.report") / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """The script as a content security policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
