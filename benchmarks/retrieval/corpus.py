"""Opening a corpus of wiki-18's number of passages: seconds and memory, the first time and later.

python benchmarks/retrieval/corpus.py --folder SCRATCH [--rows 21015324] [--chars 600]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

OPEN = """
import sys, time
from searchrl.retrieval.corpus import Corpus
def anonymous():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) / 1024
before, started = anonymous(), time.monotonic()
corpus = Corpus(sys.argv[1])
seconds = time.monotonic() - started
started = time.monotonic()
for row in range(0, len(corpus), len(corpus) // 1000):
    corpus[row]
read = (time.monotonic() - started) / 1000
grown = anonymous() - before
print(f"{len(corpus)} passages: {seconds:.2f} s, +{grown:.1f} MiB anonymous, {1e6 * read:.0f} us a passage")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="gets the generated corpus")
    parser.add_argument("--rows", type=int, default=21_015_324)
    parser.add_argument("--chars", type=int, default=600, help="of a passage; wiki-18 has about 650")
    args = parser.parse_args()
    path = args.folder / "generated.jsonl"
    args.folder.mkdir(parents=True, exist_ok=True)
    text = "a passage of a hundred words or so " * (args.chars // 35)
    with path.open("w", encoding="utf-8") as file:
        for row in range(args.rows):
            file.write(f'{{"id": "{row}", "contents": "\\"Title {row}\\"\\n{text}"}}\n')
    print(f"{path}: {path.stat().st_size / 1e9:.1f} GB")
    for name in ("first", "later"):
        command = [sys.executable, "-c", OPEN, str(path)]
        opened = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        print(f"{name}: {opened.stdout.strip()}")


if __name__ == "__main__":
    main()
