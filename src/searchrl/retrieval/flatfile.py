"""FAISS files whose end is one code after another: flat and scalar-quantized vectors.

Such a file can be written without holding the index in memory, and read through a memory map.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from searchrl.errors import MissingPackageError
from searchrl.retrieval.manifest import IndexMismatchError

_HEADER = struct.Struct("<4si q 2q ? i Q")
_INNER_PRODUCT = 0


def faiss() -> Any:
    """Import FAISS, which has no types.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        return import_module("faiss")
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            "faiss, which indexes of vectors need, is not installed; it comes with searchrl's extras cpu and "
            "gpu: `make setup` installs what was tested. A bm25 index needs none"
        ) from error


@dataclass(kw_only=True, slots=True, frozen=True)
class FlatHeader:
    """What a flat inner-product index says of itself in its first bytes."""

    rows: int
    dim: int

    @property
    def offset(self) -> int:
        """Byte at which the vectors begin."""
        return _HEADER.size

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return _HEADER.size + 4 * self.rows * self.dim


def read_flat_header(path: str | Path) -> FlatHeader:
    """Read the header of a flat index, of which ``path`` may be only the first part.

    Raises `IndexMismatchError` if it is something else.
    """
    with Path(path).open("rb") as file:
        start = file.read(_HEADER.size)
    if len(start) < _HEADER.size or start[:4] not in (b"IxFI", b"IxF2", b"IxFl"):
        raise IndexMismatchError(f"{path} is no flat FAISS index: it begins with {start[:4]!r}, not b'IxFI'")
    _, dim, rows, _, _, trained, metric, numbers = _HEADER.unpack(start)
    if metric != _INNER_PRODUCT:
        raise IndexMismatchError(f"{path} ranks by distance (FAISS metric {metric}), not by inner product")
    if not trained or dim <= 0 or rows <= 0 or numbers != rows * dim:
        raise IndexMismatchError(
            f"{path} has a damaged header: {rows} vectors of {dim} numbers, but {numbers} numbers"
        )
    return FlatHeader(rows=rows, dim=dim)


def header(index: Any, rows: int) -> bytes:
    """Return what FAISS writes before the codes of an index like ``index``, which is empty, with ``rows``.

    It is taken from a file of one row, in which the number of rows stands at byte 8 and the length of the
    codes right before them.
    """
    library = faiss()
    single = library.clone_index(index)
    single.add(np.zeros((1, index.d), dtype=np.float32))
    start = bytearray(library.serialize_index(single).tobytes()[: -index.sa_code_size()])
    (length,) = struct.unpack_from("<Q", start, len(start) - 8)
    assert struct.unpack_from("<q", start, 8) == (1,)
    assert length in (index.d, index.sa_code_size())
    struct.pack_into("<q", start, 8, rows)
    struct.pack_into("<Q", start, len(start) - 8, rows * length)
    return bytes(start)


class RowStore:
    """The vectors of a flat or scalar-quantized index file, memory-mapped, by row.

    ``sequential`` says that rows are read in order; else the kernel is told not to read ahead, which would
    fetch 128 KiB for every row.
    """

    def __init__(self, path: str | Path, *, sequential: bool = False) -> None:
        library = faiss()
        self._index = library.read_index(str(path), library.IO_FLAG_MMAP_IFC)
        self.rows = int(self._index.ntotal)
        self.dim = int(self._index.d)
        width = int(self._index.sa_code_size())
        offset = Path(path).stat().st_size - self.rows * width
        self.codes: npt.NDArray[np.uint8] = np.memmap(
            path, dtype=np.uint8, mode="r", offset=offset, shape=(self.rows, width)
        )
        """Memory-mapped, uint8 [rows, bytes of a vector]."""
        if not sequential:
            # NumPy's annotations lack the map behind a memmap.
            self.codes._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]  # see above

    def vectors(self, rows: npt.NDArray[np.int64] | slice) -> npt.NDArray[np.float32]:
        """Return the vectors of ``rows``, float32 [N, dim]."""
        codes = np.array(self.codes[rows])  # a copy: aligned, and no longer a map
        vectors: npt.NDArray[np.float32] = self._index.sa_decode(codes)
        return vectors
