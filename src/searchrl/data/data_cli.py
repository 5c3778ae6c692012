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
    _add_prepare(
        commands.add_parser("prepare", help="published question sets (NQ, HotpotQA, …) as rows of ours")
    )
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


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", choices=("train", "test"), required=True, help="what the rows are for")
    parser.add_argument(
        "--sources", help="sets by name, with commas (default: nq,hotpotqa for train, all seven for test)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for SPLIT.jsonl and its manifest")
    parser.add_argument(
        "--from", dest="origin", default="hub", metavar="hub|DIR", help="the model hub, or a local copy of it"
    )
    parser.add_argument("--format", choices=("jsonl", "parquet"), default="jsonl", help="form of the output")
    parser.add_argument("--seed", type=int, default=0, help="of the order of training rows")
    parser.set_defaults(function=_prepare)


def _prepare(args: argparse.Namespace) -> None:
    from searchrl.console import Console
    from searchrl.data.flashrag import DEFAULT_SOURCES
    from searchrl.data.prepare import prepare

    sources = DEFAULT_SOURCES[args.split]
    if args.sources is not None:
        sources = tuple(name.strip() for name in args.sources.split(",") if name.strip())
    prepare(
        args.split,
        sources,
        args.out,
        origin=args.origin,
        form=args.format,
        seed=args.seed,
        console=Console(enabled=True),
    )
