"""A larger corpus out of a small one: every passage several times, the copies' vectors with a little noise.

What finds documents gets a realistic size without weeks of encoding; what is found means nothing. The result
is imported like a published index:

    python benchmarks/retrieval/copies.py --index DIR --corpus FILE --copies 16 --out BIG
    searchrl index import --parts BIG/flat.faiss --corpus BIG/corpus.jsonl --out BIG/index --encoder …
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import faiss
import numpy as np

NOISE = 0.1
"""Length of the noise; vectors have length 1, so a copy has a cosine of about 0.995 with its original."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--index", type=Path, required=True, help="a dense index of kind flat")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--copies", type=int, default=16)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    flat = faiss.read_index(str(args.index / "dense.faiss"), faiss.IO_FLAG_MMAP_IFC)
    vectors = flat.reconstruct_n(0, flat.ntotal)
    big = faiss.IndexFlatIP(flat.d)
    rng = np.random.default_rng(0)
    lines = args.corpus.read_text(encoding="utf-8").splitlines()
    with (args.out / "corpus.jsonl").open("w", encoding="utf-8") as corpus:
        for copy in range(args.copies):
            noise = rng.standard_normal(vectors.shape, dtype=np.float32) * (NOISE / flat.d**0.5)
            moved = vectors + noise if copy else vectors
            big.add(moved / np.linalg.norm(moved, axis=1, keepdims=True))
            for line in lines:
                record = json.loads(line)
                record["id"] = f"{record['id']}-{copy}" if copy else record["id"]
                corpus.write(json.dumps(record, ensure_ascii=False) + "\n")
    faiss.write_index(big, str(args.out / "flat.faiss"))
    print(f"{args.out}: {big.ntotal} passages, {big.d} dimensions")


if __name__ == "__main__":
    main()
