"""`searchrl report`: its flags, and what it does with them."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from searchrl.report.errors import ReportError
from searchrl.report.rundir import RunReader

PORT = 8321


def argument_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="searchrl report",
        description="A run as one HTML page: curves, tables and every trajectory. docs/report.md",
    )
    parser.add_argument("run", nargs="?", type=Path, help="run directory, for example runs/quickstart")
    parser.add_argument(
        "--compare",
        nargs="+",
        type=Path,
        default=[],
        metavar="RUN",
        help="lay the curves of these runs over it",
    )
    parser.add_argument("--out", type=Path, help="where to write (default: report.html in the run directory)")
    parser.add_argument(
        "--watch", action="store_true", help="serve it on loopback, and follow a run in progress"
    )
    parser.add_argument("--port", type=int, default=PORT, help="of --watch; 0: any (default: %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Write the report, or serve it.

    Raises:
        ReportError: no such run, no run directory, the page cannot be written, or the port is taken.
    """
    parser = argument_parser()
    given = parser.parse_args(argv)
    runs = list(dict.fromkeys([*([given.run] if given.run else []), *given.compare]))
    if not runs:
        parser.error("name a run directory, for example runs/quickstart")
    if given.watch and given.out:
        parser.error("--watch writes no file: leave out --out, or --watch")
    begin = time.perf_counter()
    readers = [RunReader(run) for run in runs]
    if given.watch:
        from searchrl.report.live import serve

        serve(readers, port=given.port)
        return
    from searchrl.report.page import write_report

    for reader in readers:
        reader.refresh()
    out = given.out or runs[0] / ("report.html" if len(runs) == 1 else "compare.html")
    try:
        written = write_report(readers, out)
    except OSError as error:
        raise ReportError(
            f"{out} cannot be written ({error.strerror}); choose another place: --out PATH"
        ) from error
    for path in written:
        print(f"{path}  {_size(path) / 2**20:.1f} MiB")
    print(f"made in {time.perf_counter() - begin:.1f} s; open it in a browser")


def _size(path: Path) -> int:
    return sum(p.stat().st_size for p in path.iterdir()) if path.is_dir() else path.stat().st_size
