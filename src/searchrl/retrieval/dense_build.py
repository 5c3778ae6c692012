"""Make a FAISS index of any kind from a flat one: train on a sample, add block by block, write."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from searchrl.retrieval.flatfile import RowStore, faiss, header
from searchrl.retrieval.kinds import DenseKind, configured_index, cost, is_streamed
from searchrl.retrieval.manifest import DENSE, STORE, BuildError
from searchrl.retrieval.progress import progress as show_progress

_BLOCK = 1 << 14
_SAMPLE_SEED = 0
_HEADROOM = 64 << 20


def write_dense(flat: Path, kind: DenseKind, folder: Path, *, progress: bool) -> None:
    """Write the index of ``kind``, and its store, into ``folder`` from the flat index ``flat``.

    A part that is flat itself becomes a second name for the same file, or a copy on another file system.
    """
    for name, factory in ((DENSE, kind.factory), (STORE, kind.store)):
        if factory == "Flat":
            link(flat, folder / name)
        elif factory is not None:
            vectors = RowStore(flat, sequential=True)
            with show_progress(f"add vectors to {factory}", vectors.rows, enabled=progress) as on_rows:
                _write(vectors, factory, kind.sample, folder / name, on_rows)


def write_flat(path: str | Path, vectors: npt.NDArray[np.float32]) -> None:
    """Write an exact inner-product index over ``vectors`` [rows, dim] to ``path``."""
    index = faiss().IndexFlatIP(vectors.shape[1])
    with Path(path).open("wb") as file:
        file.write(header(index, len(vectors)))
        file.write(np.ascontiguousarray(vectors, dtype=np.float32).data)


def link(source: Path, target: Path) -> None:
    """Give a file a second name; copy it where that cannot be."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise `BuildError` unless ``folder``'s file system has room for ``needed`` bytes."""
    free = shutil.disk_usage(folder).free
    if needed + _HEADROOM > free:
        raise BuildError(
            f"{what} needs {needed / 1e9:.1f} GB in {folder}, which has {free / 1e9:.1f} GB left: "
            "make room, or choose a folder on another disk"
        )


def dense_bytes(kind: DenseKind, *, rows: int, linked: bool) -> int:
    """Disk that `write_dense` takes; nothing for a flat part if it is ``linked``."""
    price = cost(kind, rows=rows)
    own = 0 if linked and kind.factory == "Flat" else price.index
    return own + (0 if linked and kind.store == "Flat" else price.store)


def _write(flat: RowStore, factory: str, sample: int, path: Path, on_rows: Callable[[int], None]) -> None:
    library = faiss()
    library.cvar.distance_compute_blas_threshold = 4 * flat.dim  # see dense.py
    index = configured_index(factory, flat.dim, {})
    if not index.is_trained:
        index.train(_sample(flat, sample))
    if not is_streamed(factory):
        _add(flat, index.add, on_rows)
        library.write_index(index, str(path))
        return
    with path.open("wb") as file:
        file.write(header(index, flat.rows))
        _add(flat, lambda block: file.write(index.sa_encode(block).data), on_rows)


def _add(
    flat: RowStore, add: Callable[[npt.NDArray[np.float32]], Any], on_rows: Callable[[int], None]
) -> None:
    for start in range(0, flat.rows, _BLOCK):
        block = flat.vectors(slice(start, start + _BLOCK))
        add(block)
        on_rows(len(block))


def _sample(flat: RowStore, sample: int) -> npt.NDArray[np.float32]:
    """Return the same ``sample`` rows every time, in their order."""
    rows = np.random.default_rng(_SAMPLE_SEED).choice(flat.rows, min(sample, flat.rows), replace=False)
    return flat.vectors(np.sort(rows))
