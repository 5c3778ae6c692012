"""Command line of indexes: ``searchrl index build | import | convert | evaluate | kinds``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from searchrl.config import IndexKind
from searchrl.console import Console
from searchrl.retrieval.encoder import EncoderFamily

if TYPE_CHECKING:
    from searchrl.retrieval.manifest import Manifest

WIKI18_ROWS = 21_015_324
_WIKI18_DIM = 768
_EVALUATED = "flat,fp16,sq8,pq_fastscan+fp16"


def main(argv: Sequence[str] | None = None, *, resolve_encoder: Callable[[str], Path] = Path) -> None:
    """Run one command. ``resolve_encoder`` turns ``--encoder`` (a hub name, say) into a folder."""
    parser = argument_parser()
    args = parser.parse_args(argv)
    if getattr(args, "encoder", None) is not None:
        args.encoder = resolve_encoder(args.encoder)
    args.function(args, parser)


def argument_parser() -> argparse.ArgumentParser:
    """All commands and their flags."""
    parser = argparse.ArgumentParser(prog="searchrl index", description="Make and compare retrieval indexes.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_build(commands.add_parser("build", help="index a corpus; goes on where a killed build ended"))
    _add_import(commands.add_parser("import", help="take a published flat FAISS index, as wiki-18's"))
    _add_convert(commands.add_parser("convert", help="make another kind of a flat index, without encoding"))
    _add_evaluate(commands.add_parser("evaluate", help="compare kinds: recall against flat, memory, speed"))
    _add_kinds(commands.add_parser("kinds", help="list the kinds of dense index, and what each costs"))
    return parser


def _add_build(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(function=_build)
    parser.add_argument(
        "--corpus", type=Path, required=True, help="JSONL, may be .gz: unpacked beside it, once"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the index")
    parser.add_argument("--kind", type=IndexKind, default=IndexKind.dense, help="bm25, dense or hybrid")
    parser.add_argument("--dense-index", default="flat", help="a name that `searchrl index kinds` lists")
    _add_encoder(parser, required=False)
    _add_devices(parser)


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(function=_import)
    parser.add_argument("--parts", type=Path, nargs="+", required=True, help="in their order")
    parser.add_argument("--out", type=Path, required=True, help="folder of the index")
    parser.add_argument("--corpus", type=Path, required=True, help="what it was made from: JSONL, may be .gz")
    _add_encoder(parser, required=True)
    parser.add_argument("--sha256", help="of the parts together")
    parser.add_argument("--rows", type=int, help=f"vectors it should have; wiki-18: {WIKI18_ROWS}")
    parser.add_argument("--move", action="store_true", help="use the parts up instead of copying them")


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(function=_convert)
    parser.add_argument("--index", type=Path, required=True, help="folder of an index with exact vectors")
    parser.add_argument("--dense-index", required=True, help="a name that `searchrl index kinds` lists")
    parser.add_argument("--out", type=Path, required=True, help="folder of the new index")


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(function=_evaluate)
    parser.add_argument("--index", type=Path, required=True, help="folder of a flat index; built if missing")
    parser.add_argument("--corpus", type=Path, help="for building it, and for sampling queries")
    parser.add_argument(
        "--kinds",
        nargs="+",
        default=[_EVALUATED],
        help="separated by spaces or commas; FAISS's own by spaces",
    )
    parser.add_argument(
        "--queries", default="256", help='JSONL with "question", or how many to take from passages'
    )
    parser.add_argument("--top-k", type=int, default=3)
    _add_encoder(parser, required=False)
    _add_devices(parser)


def _add_kinds(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(function=_kinds)
    parser.add_argument("--rows", type=int, default=WIKI18_ROWS, help="passages; default: wiki-18")
    parser.add_argument("--dim", type=int, default=_WIKI18_DIM, help="numbers of a vector; default: E5 base")


def _add_encoder(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument("--encoder", required=required, help="sentence encoder")
    parser.add_argument(
        "--encoder-family", type=EncoderFamily, default=EncoderFamily.E5, help="e5, bge or minilm"
    )


def _add_devices(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--devices", type=_comma_list, default=["cpu"], help="to encode on: cpu, or cuda:0,cuda:1"
    )
    parser.add_argument("--processes", type=int, default=1, help="that share the cores, on the CPU")
    parser.add_argument(
        "--batch-size", type=int, help="passages at once; default: 32 on the CPU, 256 on a GPU"
    )


def _comma_list(text: str) -> list[str]:
    return text.split(",")


def _made(args: argparse.Namespace, folder: Path, kind: IndexKind, dense_index: str) -> Manifest:
    from searchrl.retrieval.build import build_index

    return build_index(
        args.corpus,
        folder,
        kind=kind,
        encoder_path=args.encoder,
        encoder_family=args.encoder_family,
        dense_index=dense_index,
        devices=args.devices,
        processes=args.processes,
        batch_size=args.batch_size,
    )


def _say_made(folder: Path, manifest: Manifest) -> None:
    print(f"{folder}: {manifest.rows:,} passages, fingerprint {manifest.fingerprint}")


def _build(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if (args.kind is not IndexKind.bm25) != (args.encoder is not None):
        parser.error("--encoder is needed for --kind dense and hybrid, and only for these")
    _say_made(args.out, _made(args, args.out, args.kind, args.dense_index))


def _import(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    from searchrl.retrieval.importing import import_index

    manifest = import_index(
        args.parts,
        args.out,
        corpus_path=args.corpus,
        encoder_path=args.encoder,
        encoder_family=args.encoder_family,
        sha256=args.sha256,
        rows=args.rows,
        move=args.move,
    )
    _say_made(args.out, manifest)


def _convert(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    from searchrl.retrieval.convert import convert_index

    _say_made(args.out, convert_index(args.index, args.out, dense_index=args.dense_index))


def _evaluate(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    from searchrl.retrieval.corpus import Corpus
    from searchrl.retrieval.index_evaluate import evaluate_kinds, read_queries, sample_queries
    from searchrl.retrieval.progress import say
    from searchrl.retrieval.unpack import unpacked

    if args.corpus is None and (args.queries.isdecimal() or not args.index.exists()):
        parser.error("--corpus is needed to build the index, and to take queries from")
    if not args.index.exists():
        if args.encoder is None:
            parser.error(f"there is no index at {args.index}; give --encoder to build it")
        _made(args, args.index, IndexKind.dense, "flat")
    if args.queries.isdecimal():
        queries = sample_queries(Corpus(unpacked(args.corpus)), int(args.queries))
    else:
        queries = read_queries(Path(args.queries))
    kinds = [name for text in args.kinds for name in ([text] if text[:1].isupper() else text.split(","))]
    results = evaluate_kinds(
        args.index,
        kinds,
        queries=queries,
        encoder_path=args.encoder,
        top_k=args.top_k,
        on_result=lambda result: say(f"{result.kind}: recall@{args.top_k} {result.recall:.4f}"),
    )
    recall = f"recall@{args.top_k}"
    columns = [
        "kind",
        recall,
        "disk MB",
        "memory MB",
        "mapped MB",
        "build s",
        "q/s at 1",
        "q/s at 64",
        "CPU ms/q",
    ]
    rows = [
        [
            result.kind,
            f"{result.recall:.4f}",
            *(f"{size / 1e6:.1f}" for size in (result.disk, result.resident, result.mapped)),
            f"{result.build_s:.1f}",
            f"{result.single_qps:.0f}",
            f"{result.batch_qps:.0f}",
            f"{result.cpu_ms:.2f}",
        ]
        for result in results
    ]
    Console(enabled=True).table(f"{len(queries)} queries, one thread, without encoding", columns, rows)


def _kinds(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    from searchrl.retrieval.kinds import RECIPES, cost, resolve_kind

    rows = []
    for name in [*RECIPES, "pq_fastscan+fp16", "pq_fastscan+sq8", "rabitq1+sq8"]:
        kind = resolve_kind(name, rows=args.rows, dim=args.dim)
        price = cost(kind, rows=args.rows)
        settings = " ".join(f"{key}={value}" for key, value in kind.search.items())
        sizes = [f"{size / 1e9:.2f}" for size in (price.index, price.store, price.building)]
        each = f"{price.index / args.rows:.0f}"
        rows.append([name, kind.factory, each, *sizes, f"{kind.sample:,}", settings])
    columns = ["kind", "FAISS", "B/vector", "memory GB", "store GB", "to build GB", "sample", "search"]
    Console(enabled=True).table(f"computed for {args.rows:,} vectors of {args.dim} numbers", columns, rows)
    print(
        "memory: what searches scan; store: memory-mapped, read at random.\n"
        "NAME+flat, +fp16 and +sq8 score the candidates of any kind from such a store.\n"
        "NAME:nprobe=N, :efSearch=N and :candidates=N set search parameters."
    )
