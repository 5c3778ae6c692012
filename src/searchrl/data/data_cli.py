"""``searchrl data``: what makes question sets."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> None:
    """Run one subcommand.

    Raises:
        SearchrlError: the work failed; the message says why and what to do.
    """
    parser = argparse.ArgumentParser(prog="searchrl data", description="Build question sets.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_worldfacts(commands.add_parser("worldfacts", help="real passages and questions from PyPI packages"))
    args = parser.parse_args(argv)
    args.function(args)


def _add_worldfacts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("assets/worldfacts"), help="folder to build")
    parser.add_argument("--wheels", type=Path, default=Path("assets/wheels"), help="folder of packages")
    parser.set_defaults(function=_worldfacts)


def _worldfacts(args: argparse.Namespace) -> None:
    from searchrl.data.worldfacts import build_worldfacts

    build_worldfacts(args.out, args.wheels)
    print(f"{args.out} is complete; its sources and licences are in {args.out / 'LICENSES.md'}")
