"""The long form of ``tests/fuzz``: model outputs, configurations and data by the ten thousand.

    python benchmarks/faults/fuzzing.py --outputs 100000 --configs 3000 --rows 10000 --json fuzz.json
    python benchmarks/faults/fuzzing.py --only outputs --tokenizers package:smollm2-135m FOLDER=151936

Outputs go through each tokenizer in equal shares; ``FOLDER=SIZE`` says how many rows the model's head has,
where that is more than the tokenizer knows. Every case is drawn from a seed of its own, ``SEED/NUMBER``: a
case that fails is named by it and ends the command. The data readers get ``--rows`` inputs each.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
from transformers import PreTrainedTokenizerFast

from example import touch_shipped_files
from fuzz import configs, outputs, rows
from searchrl.environment import prepare_environment
from searchrl.models import resolve_model
from searchrl.protocol import load_tokenizer

ASSETS = Path(__file__).resolve().parents[2] / "assets"
TINY, SMOLLM2 = "random:tiny", "package:smollm2-135m"


def campaign(
    name: str, check: Callable[[Random], Counter[str]], *, seed: str, until: str, number: int
) -> Counter[str]:
    """Check cases until ``number`` of what ``until`` counts; prints and returns the counts."""
    seen: Counter[str] = Counter()
    start = time.perf_counter()
    case = 0
    while seen[until] < number:
        try:
            seen += check(Random(f"{seed}/{case}"))
        except BaseException:
            print(f"{name}: seed {seed}/{case}", file=sys.stderr)
            raise
        case += 1
    seen["seconds"] = round(time.perf_counter() - start)
    print(
        f"{name}: {case:,} cases; " + ", ".join(f"{kind} {count:,}" for kind, count in sorted(seen.items())),
        flush=True,
    )
    return seen


def fuzz_outputs(tokenizers: list[str], number: int, seed: str) -> dict[str, Counter[str]]:
    """Outputs through every tokenizer."""
    found = {}
    with asyncio.Runner() as runner:
        for name in tokenizers:
            source, _, size = name.partition("=")
            # A tokenizer alone is no checkpoint.
            tokenizer = load_tokenizer(source if Path(source).is_dir() else resolve_model(source, ASSETS))
            assert isinstance(tokenizer, PreTrainedTokenizerFast)
            vocabulary = outputs.Vocabulary(tokenizer, size=int(size) if size else None)

            def check(random: Random, vocabulary: outputs.Vocabulary = vocabulary) -> Counter[str]:
                return outputs.check_case(vocabulary, runner, outputs.make_case(random, vocabulary))

            share = -(-number // len(tokenizers))
            label = f"outputs, {Path(source).name}, {vocabulary.size:,} tokens"
            found[label] = campaign(label, check, seed=seed, until="outputs", number=share)
    return found


def fuzz_configs(number: int, seed: str) -> dict[str, Counter[str]]:
    """Configurations, composed in a folder that has every file that the shipped ones name."""

    def check(random: Random) -> Counter[str]:
        return Counter([configs.check_config(configs.make_malformed(random)), "configurations"])

    with elsewhere() as folder:
        touch_shipped_files(folder)
        return {
            "configurations": campaign(
                "configurations", check, seed=seed, until="configurations", number=number
            )
        }


def fuzz_rows(number: int, seed: str) -> dict[str, Counter[str]]:
    """Inputs for every reader of data."""
    found = {}
    with elsewhere() as folder:
        for name, one in rows.CHECKS.items():

            def check(random: Random, one: Callable[[Random, Path], str] = one) -> Counter[str]:
                outcome = one(random, folder)
                return Counter({outcome: 1, "inputs": outcome != "unwritable"})

            found[name] = campaign(name, check, seed=seed, until="inputs", number=number)
    return found


@contextmanager
def elsewhere() -> Iterator[Path]:
    """A folder of its own to work in, in memory where there is room for files."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


def main() -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--outputs", type=int, default=100_000, help="model outputs over all tokenizers")
    parser.add_argument("--configs", type=int, default=3_000)
    parser.add_argument("--rows", type=int, default=10_000, help="inputs for each reader of data")
    parser.add_argument("--tokenizers", nargs="+", default=[TINY, SMOLLM2])
    parser.add_argument("--only", choices=("outputs", "configs", "rows"))
    parser.add_argument("--seed", default="0")
    parser.add_argument("--json", type=Path, help="where the counts are written")
    args = parser.parse_args()
    prepare_environment("cpu")
    warnings.simplefilter("error")
    os.environ.setdefault("BRAVE_API_KEY", "none")  # so that an address is all that is wrong
    found: dict[str, Counter[str]] = {}
    if args.only in (None, "outputs"):
        found |= fuzz_outputs(args.tokenizers, args.outputs, args.seed)
    if args.only in (None, "configs"):
        found |= fuzz_configs(args.configs, args.seed)
    if args.only in (None, "rows"):
        found |= fuzz_rows(args.rows, args.seed)
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
