"""Encode a corpus into a file of vectors: in shards, by several processes or GPUs, going on after a kill.

The file is a flat FAISS index from the start, each shard written at its place. A shard counts as finished
once its bytes are on the disk and its number stands in the list beside it. Shards have the same rows however
many workers there are, and a CPU worker runs each batch on one core: so the bytes do not depend on the
workers.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from searchrl.retrieval.corpus import Corpus
from searchrl.retrieval.encoder import Encoder, EncoderFamily, TextKind
from searchrl.retrieval.flatfile import faiss, header
from searchrl.retrieval.manifest import BuildError

SHARD_ROWS = 2048
"""Passages of a shard: what a killed worker loses."""
BATCH_SIZE = {"cpu": 32, "cuda": 256}
"""Passages of a forward pass, by device type."""


@dataclass(kw_only=True, slots=True, frozen=True)
class EncodeJob:
    """What to encode, and where the vectors go."""

    corpus: Path
    rows: int
    dim: int
    encoder: Path
    family: EncoderFamily
    batch_size: int | None
    """None: that of the device."""
    vectors: Path
    """A flat FAISS index; the list of its finished shards lies beside it."""

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // SHARD_ROWS)

    @property
    def _list(self) -> Path:
        return self.vectors.with_suffix(".shards")

    def finished(self) -> set[int]:
        """Shards that are on the disk. A number without newline is a torn one."""
        if not self._list.is_file():
            return set()
        return {int(line) for line in self._list.read_text().splitlines(keepends=True) if line.endswith("\n")}

    def finish(self, shard: int) -> None:
        """Note that ``shard`` is on the disk."""
        with self._list.open("a") as file:
            file.write(f"{shard}\n")
            file.flush()
            os.fsync(file.fileno())

    def allocate(self) -> None:
        """Make the file at its full length, unless it is there."""
        if self.vectors.exists():
            return
        start = header(faiss().IndexFlatIP(self.dim), self.rows)
        temporary = self.vectors.with_suffix(".new")
        with temporary.open("wb") as file:
            file.write(start)
            file.truncate(len(start) + 4 * self.rows * self.dim)
        temporary.rename(self.vectors)

    def open_encoder(self, device: str, threads: int) -> Encoder:
        """Load the encoder."""
        batch_size = self.batch_size or BATCH_SIZE[device.partition(":")[0]]
        return Encoder(self.encoder, self.family, batch_size=batch_size, threads=threads, device=device)

    def encode(self, shard: int, corpus: Corpus, encoder: Encoder, on_rows: Callable[[int], None]) -> None:
        """Encode one shard and put it on the disk."""
        rows = range(shard * SHARD_ROWS, min(self.rows, (shard + 1) * SHARD_ROWS))
        texts = [corpus[row].contents for row in rows]
        vectors = encoder.encode(texts, TextKind.PASSAGE, on_progress=on_rows)
        offset = self.vectors.stat().st_size - 4 * self.dim * (self.rows - rows.start)
        with self.vectors.open("r+b") as file:
            file.seek(offset)
            file.write(vectors.data)
            file.flush()
            os.fsync(file.fileno())


def encode_corpus(
    job: EncodeJob, *, devices: Sequence[str], processes: int, on_rows: Callable[[int], None]
) -> None:
    """Encode all shards that are not finished.

    On the CPU ``processes`` share the cores; 1 stays in this process. Each GPU gets a process of its own.
    ``on_rows`` is called with the passages encoded since its last call. Raises `BuildError` when a worker
    fails or dies; finished shards stay.
    """
    job.allocate()
    finished = job.finished()
    pending = deque(shard for shard in range(job.shards) if shard not in finished)
    if not pending:
        return
    cores = len(os.sched_getaffinity(0))
    if list(devices) == ["cpu"] and processes == 1:
        corpus, encoder = Corpus(job.corpus), job.open_encoder("cpu", cores)
        for shard in pending:
            job.encode(shard, corpus, encoder, on_rows)
            job.finish(shard)
        return
    places = [device for device in devices for _ in range(processes if device == "cpu" else 1)]
    places = places[: len(pending)]
    _Pool(job, places, threads=max(1, cores // len(places))).run(pending, on_rows)


class _Pool:
    """Worker processes that each ask for the next shard when they have finished one."""

    def __init__(self, job: EncodeJob, places: Sequence[str], *, threads: int) -> None:
        self._job = job
        context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
        self._workers: dict[Connection, tuple[BaseProcess, str]] = {}
        for place in places:
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, job, place, threads), daemon=True)
            process.start()
            theirs.close()  # so that ours reads its end when the worker dies
            self._workers[ours] = (process, place)

    def run(self, pending: deque[int], on_rows: Callable[[int], None]) -> None:
        """Hand out all shards and wait for them."""
        try:
            for connection in list(self._workers):
                self._hand_out(connection, pending)
            while self._workers:
                for ready in wait(list(self._workers)):
                    assert isinstance(ready, Connection)  # it would wait for other things too
                    self._receive(ready, pending, on_rows)
        finally:
            for process, _ in self._workers.values():
                process.kill()

    def _receive(self, connection: Connection, pending: deque[int], on_rows: Callable[[int], None]) -> None:
        try:
            kind, value = connection.recv()
        except (EOFError, ConnectionError):
            raise self._died(connection) from None
        match kind:
            case "rows":
                on_rows(value)
            case "finished":
                self._job.finish(value)
                self._hand_out(connection, pending)
            case _:
                place = self._workers[connection][1]
                raise BuildError(f"a worker on {place} failed; {self._kept()}:\n{value}")

    def _hand_out(self, connection: Connection, pending: deque[int]) -> None:
        """Give the worker a shard, or let it go if there is none."""
        shard = pending.popleft() if pending else None
        try:
            connection.send(shard)
        except OSError:
            raise self._died(connection) from None
        if shard is None:
            self._workers.pop(connection)[0].join()

    def _died(self, connection: Connection) -> BuildError:
        process, place = self._workers[connection]
        process.join()
        code = process.exitcode or 0
        reason = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        memory = ", often a sign of too little memory" if code == -signal.SIGKILL else ""
        return BuildError(f"a worker on {place} {reason}{memory}; {self._kept()}")

    def _kept(self) -> str:
        return (
            f"{len(self._job.finished())} of {self._job.shards} shards are finished and kept: "
            "run the same command again to go on"
        )


def _work(connection: Connection, job: EncodeJob, device: str, threads: int) -> None:
    """Encode shard after shard, until there are none or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us
    if device == "cpu":
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        import torch

        torch.set_num_threads(1)
    try:
        corpus, encoder = Corpus(job.corpus), job.open_encoder(device, threads)
        while (shard := connection.recv()) is not None:
            job.encode(shard, corpus, encoder, lambda rows: connection.send(("rows", rows)))
            connection.send(("finished", shard))
    except (EOFError, ConnectionError):  # the parent is gone
        return
    except Exception:  # whatever it is ends the build, in the parent, with its reason
        connection.send(("failed", traceback.format_exc()))
