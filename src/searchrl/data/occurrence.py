"""Which of many answers occur in a corpus: one pass over it by several processes, never in memory whole.

This process reads the file, packed or not, in blocks of whole lines; the workers unpack, normalise and search
them. Reading is many times faster than searching, so that one reader keeps many workers busy.
"""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import signal
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from searchrl.answers import normalize
from searchrl.data.errors import DataError

BLOCK_BYTES = 1 << 20
"""Text of a block, before its last line is completed: about a sixth of a second of work."""
_LONGEST_LINE = 1 << 26
_BLOCKS_AHEAD = 3
"""Blocks read per worker before the oldest one must be done; what bounds the memory."""
_GZIP_MAGIC = b"\x1f\x8b"


class AnswerFinder:
    """Looks for many answers in one text after another; an answer once found is no longer looked for."""

    def __init__(self, answers: Iterable[str]) -> None:
        self._by_token: dict[str, list[str]] = {}
        for answer in {normalize(answer) for answer in answers} - {""}:
            # The longest token is a rare one: few texts have it without the whole answer.
            self._by_token.setdefault(max(answer.split(), key=len), []).append(answer)

    def find(self, text: str) -> list[str]:
        """The answers, normalised, that occur in ``text`` and in no text before.

        An answer occurs where `searchrl.answers.contains_answer` says so: as whole tokens, both normalised.
        """
        normal = normalize(text)
        padded, found = f" {normal} ", []
        for token in self._by_token.keys() & normal.split():
            answers = self._by_token[token]
            missing = [answer for answer in answers if f" {answer} " not in padded]
            if len(missing) < len(answers):
                found += [answer for answer in answers if answer not in missing]
                self._by_token[token] = missing
                if not missing:
                    del self._by_token[token]
        return found


@dataclass(kw_only=True, slots=True, frozen=True)
class Search:
    """What a pass over a corpus found."""

    answers: frozenset[str]
    """Those that occur, normalised."""
    passages: int
    """How many there are in the corpus."""


class _Block(NamedTuple):
    """Some lines of the corpus."""

    line: int
    """Number of the first one, from 1."""
    text: bytes
    end: int
    """Position in the file, packed as it may be, up to which it was read for this block."""


def search_corpus(
    answers: Iterable[str], corpus: Path, *, workers: int, on_bytes: Callable[[int], None] = lambda _: None
) -> Search:
    """Find out which answers occur in any passage (title and text) of a corpus.

    Args:
        answers: as the questions have them; what is empty once normalised occurs nowhere.
        corpus: JSON lines ``{"id", "contents"}``, may be gzip-compressed.
        workers: processes that search.
        on_bytes: called with the bytes of the file that were searched since its last call.

    Raises:
        DataError: a missing, damaged or empty corpus, a line that is no passage (with its number), fewer than
            one worker, or a worker that was killed.
    """
    if workers < 1:
        raise DataError(f"workers={workers}: at least one process must search")
    found: set[str] = set()
    passages = done = 0
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),  # a fork of a process with threads may hang
        initializer=_start_worker,
        initargs=({normalize(answer) for answer in answers},),
    )
    try:
        for end, (new, count) in _searched(pool, corpus, ahead=_BLOCKS_AHEAD * workers):
            found.update(new)
            passages += count
            on_bytes(end - done)
            done = end
    except BrokenProcessPool as error:
        raise DataError(
            f"a process that searched {corpus} was killed, often a sign of too little memory: run the "
            f"command again, with fewer than {workers} workers if there are more"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
    if not passages:
        raise DataError(f"{corpus} holds no passages; build or download it again")
    return Search(answers=frozenset(found), passages=passages)


def _searched(pool: ProcessPoolExecutor, corpus: Path, ahead: int) -> Iterator[tuple[int, _Result]]:
    """Each block's end and result, in the order of the file: the first bad line is the one reported."""
    pending: deque[tuple[int, Future[_Result]]] = deque()
    for block in _blocks(corpus):
        pending.append((block.end, pool.submit(_search_block, corpus, block.line, block.text)))
        if len(pending) > ahead:
            end, future = pending.popleft()
            yield end, future.result()
    for end, future in pending:
        yield end, future.result()


def _blocks(corpus: Path) -> Iterator[_Block]:
    """The lines of the file, unpacked, in blocks."""
    line = 1
    try:
        with corpus.open("rb") as file:
            packed = file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
            file.seek(0)
            stream = gzip.GzipFile(fileobj=file) if packed else file
            while text := stream.read(BLOCK_BYTES):
                rest = stream.readline(_LONGEST_LINE)
                if len(rest) == _LONGEST_LINE:
                    last = line + text.count(b"\n")
                    raise DataError(
                        f"{corpus}, line {last}: over {_LONGEST_LINE >> 20} MiB; a line is one passage"
                    )
                text += rest
                yield _Block(line, text, file.tell())
                line += text.count(b"\n")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{corpus} is damaged after line {line - 1} ({error}): fetch it again") from error
    except OSError as error:
        raise DataError(f"cannot read the corpus: {error}") from error


# --- in the workers -------------------------------------------------------------------------------------

_Result = tuple[list[str], int]
"""Answers that this worker had not found before, and the passages of the block."""

_finder = AnswerFinder([])
"""Each worker's own."""


def _start_worker(answers: set[str]) -> None:
    global _finder
    _finder = AnswerFinder(answers)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    """A killed parent cannot end its workers, which would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _search_block(corpus: Path, first: int, text: bytes) -> _Result:
    lines = text.removesuffix(b"\n").split(b"\n")
    found = []
    for number, line in enumerate(lines, first):
        found += _finder.find(_contents(line, f"{corpus}, line {number}"))
    return found, len(lines)


def _contents(line: bytes, where: str) -> str:
    try:
        row: object = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # malformed JSON, malformed UTF-8, nested without end
        raise DataError(
            f"{where}: not valid JSON in UTF-8 ({error}); every line must be one passage"
        ) from error
    contents = row.get("contents") if isinstance(row, dict) else None
    if not isinstance(row, dict) or "id" not in row or not isinstance(contents, str):
        raise DataError(f'{where}: expected {{"id": …, "contents": "…"}}, got {line[:80]!r}')
    return contents
