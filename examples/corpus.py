"""A corpus of one's own: text files to passages, a line each.

From the folder that holds ``examples``::

    python -m examples.corpus notes/corpus.jsonl docs/*.md
    searchrl index build --kind bm25 --corpus notes/corpus.jsonl --out notes/bm25

Paragraphs are joined to passages of about 100 words, as published corpora have them. The first line of
``contents`` is the title in quotes, here the file's name.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

WORDS = 100


def passages(text: str) -> Iterator[str]:
    """Neighbouring paragraphs, joined until they have ``WORDS`` words or more."""
    words: list[str] = []
    for paragraph in text.split("\n\n"):
        words += paragraph.split()
        if len(words) >= WORDS:
            yield " ".join(words)
            words = []
    if words:
        yield " ".join(words)


def main(corpus: Path, files: list[Path]) -> None:
    """Write ``corpus``: ``{"id", "contents"}`` for every passage of the files."""
    texts = [(file, passage) for file in files for passage in passages(file.read_text(encoding="utf-8"))]
    corpus.parent.mkdir(parents=True, exist_ok=True)
    with corpus.open("w", encoding="utf-8") as lines:
        for number, (file, passage) in enumerate(texts):
            row = {"id": str(number), "contents": f'"{file.stem}"\n{passage}'}
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
