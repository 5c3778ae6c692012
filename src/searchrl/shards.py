"""Trained weights and AdamW's moments in files that any number of ranks reads, whatever number wrote them.

ZeRO cuts parameters wherever a rank's share ends. A rank writes the pieces that it holds, each as flat fp32
tensors that say which elements of which parameter they are; a rank that reads takes from all files what its
own pieces cover. Nothing is gathered, and neither the number of ranks nor the ZeRO stage has to stay. Worked
example, a parameter of 10 elements saved by two ranks and read by three::

    saved   rank 0: 0 1 2 3 4           rank 1: 5 6 7 8 9
    read    rank 0: 0 1 2 3             from rank 0's file
            rank 1:         4 5 6 7     from both
            rank 2:                 8 9 from rank 1's

The files are safetensors: reading them executes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from searchrl.errors import SearchrlError

MAX_FILE_BYTES = 2**31
"""A file ends before it grows beyond this, so that a rank never holds more in memory to write it."""

_STEPS = "optimizer_steps"


class ShardError(SearchrlError, RuntimeError):
    """Files cannot be written, or do not hold what is to be read; the message says which."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Piece:
    """Consecutive elements of one flattened parameter, with everything that training keeps about them."""

    name: str
    """Of the parameter."""
    start: int
    """The first element's place in the parameter."""
    size: int
    """Elements of the whole parameter."""
    tensors: Mapping[str, Tensor]
    """fp32 [n] each: ``weight`` and, after the first optimizer step, ``exp_avg`` and ``exp_avg_sq``. Views of
    the memory that training uses."""


def write_pieces(pieces: Iterable[Piece], folder: Path, *, rank: int, steps: int) -> None:
    """Write this rank's pieces.

    Args:
        pieces: of all ranks together every element once.
        folder: exists.
        rank: names the files.
        steps: of the optimizer, AdamW's own count.

    Raises:
        ShardError: the disk is full, or cannot be written to.
    """
    part: dict[str, Tensor] = {}
    files = nbytes = 0

    def flush() -> None:
        nonlocal part, files, nbytes
        path = folder / f"rank{rank:04d}-{files:04d}.safetensors"
        try:
            save_file(part, path, metadata={_STEPS: str(steps)})
        except (SafetensorError, OSError) as error:
            raise ShardError(f"{path} cannot be written: {error}") from error
        part, files, nbytes = {}, files + 1, 0

    for piece in pieces:
        for kind, tensor in piece.tensors.items():
            if part and nbytes + tensor.nbytes > MAX_FILE_BYTES:
                flush()
            # A copy, because safetensors wants tensors that share no storage.
            part[f"{kind}:{piece.start}:{piece.name}"] = tensor.detach().to("cpu", copy=True)
            nbytes += tensor.nbytes
    if part:
        flush()


def saved_steps(folder: Path) -> int:
    """What ``write_pieces`` was told; raises ``ShardError`` if there are no files of its."""
    for path in _files(folder):
        with safe_open(path, framework="pt") as file:
            return int(file.metadata()[_STEPS])
    raise ShardError(f"{folder} holds no weights")


def read_pieces(pieces: Sequence[Piece], folder: Path) -> None:
    """Fill the pieces' tensors from the files of all ranks.

    Raises:
        ShardError: elements are missing, or a parameter has another size; names the parameters.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in _files(folder)]
        saved = _index(files)
        lacking = [
            f"{kind} of {piece.name}"
            for piece in pieces
            for kind, tensor in piece.tensors.items()
            if not _fill(tensor, piece, saved.get((kind, piece.name), []))
        ]
    if lacking:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise ShardError(
            f"{folder} does not hold what is trained here: missing or of another size: "
            f"{', '.join(lacking[:3])}{more}"
        )


@dataclass(kw_only=True, slots=True, frozen=True)
class _Stored:
    """One tensor of a file."""

    start: int
    length: int
    rows: Any
    """safetensors' slice of it: read when it is indexed."""


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("rank*.safetensors"))


def _index(files: Sequence[Any]) -> dict[tuple[str, str], list[_Stored]]:
    """Everything in the files by kind and name."""
    found: dict[tuple[str, str], list[_Stored]] = {}
    for file in files:
        for key in file.keys():  # noqa: SIM118  # safetensors' file is no mapping
            kind, start, name = key.split(":", 2)
            rows = file.get_slice(key)
            stored = _Stored(start=int(start), length=rows.get_shape()[0], rows=rows)
            found.setdefault((kind, name), []).append(stored)
    return found


@torch.no_grad()
def _fill(tensor: Tensor, piece: Piece, stored: Sequence[_Stored]) -> bool:
    """Copy what overlaps; False unless the parameter has the same size and every element came."""
    filled = 0
    for part in stored:
        low = max(part.start, piece.start)
        high = min(part.start + part.length, piece.start + len(tensor))
        if low < high:
            values = part.rows[low - part.start : high - part.start]
            tensor[low - piece.start : high - piece.start].copy_(values)
            filled += high - low
    return filled == len(tensor) and sum(part.length for part in stored) == piece.size
