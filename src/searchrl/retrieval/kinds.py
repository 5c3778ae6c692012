"""Ways to hold vectors, by name, and what each costs.

A name is ``KIND[+STORE][:PARAMETER=N]…``: ``sq8``, ``pq_fastscan+fp16``, ``ivf_sq8:nprobe=256``. With a store
(``flat``, ``fp16``, ``sq8``) the small index only proposes candidates, which are scored from the store. Names
that start with a capital letter are FAISS's own descriptions (``IVF4096,SQ6``), for which parameters are the
user's.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from searchrl.retrieval.flatfile import faiss
from searchrl.retrieval.manifest import BuildError

CANDIDATES = 64
"""Candidates that are scored from the store; `dense.FaissVectors` takes more for more than four results."""
_STORES = {"flat": "Flat", "fp16": "SQfp16", "sq8": "SQ8"}
_PARAMETERS = ("nprobe", "efSearch", "candidates")
_PQ_SAMPLE = 1 << 16
"""Training vectors for quantizers: 256 for each of 256 centroids, more than which FAISS does not use."""
_POINTS_PER_LIST = 40
"""Training vectors for each inverted list; FAISS warns below 39."""


@dataclass(kw_only=True, slots=True, frozen=True)
class DenseKind:
    """A kind for a corpus of certain size and vectors of certain length."""

    name: str
    dim: int
    factory: str
    """What `faiss.index_factory` makes the index from."""
    store: str | None
    """The same for the store."""
    search: dict[str, int]
    """Search-time parameters."""
    sample: int
    """Vectors that it is trained on."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Cost:
    """Computed bytes of a kind."""

    index: int
    """Scanned by searches: has to fit in memory for speed, though it may be memory-mapped."""
    store: int
    """Memory-mapped and read at random, a few rows a query: a disk will do."""
    building: int
    """Memory to build it: the training sample, and the index unless it is written as it grows."""


@dataclass(kw_only=True, slots=True, frozen=True)
class _Recipe:
    about: str
    factory: Callable[[int, int], str]
    """From rows and dim."""
    sample: Callable[[int], int] = lambda rows: _PQ_SAMPLE
    min_rows: int = 1
    search: Callable[[int], dict[str, int]] = lambda rows: {}


def _lists(rows: int) -> int:
    """Inverted lists for so many rows: about 4 √rows, a power of two, each with enough to train on."""
    wanted, trainable = round(math.log2(4 * math.sqrt(rows))), int(math.log2(max(1, rows // 39)))
    return 1 << max(0, min(wanted, trainable))


def _parts(dim: int) -> int:
    """Sub-vectors of product quantization: of four numbers, or the next length that divides ``dim``."""
    return dim // next(length for length in range(min(4, dim), dim + 1) if dim % length == 0)


def _ivf(about: str, codes: Callable[[int], str], *, min_rows: int = 1) -> _Recipe:
    """A recipe of inverted lists whose codes are described by ``codes(dim)``."""
    return _Recipe(
        about=about,
        factory=lambda rows, dim: f"IVF{_lists(rows)},{codes(dim)}",
        sample=lambda rows: max(_PQ_SAMPLE, _POINTS_PER_LIST * _lists(rows)),
        min_rows=min_rows,
        search=lambda rows: {"nprobe": min(_lists(rows), max(128, _lists(rows) // 16))},
    )


def _hnsw(about: str, codes: str) -> _Recipe:
    return _Recipe(about=about, factory=lambda r, d: f"HNSW32,{codes}", search=lambda r: {"efSearch": 128})


# "np" leaves out polysemous training: half a minute for each sub-vector, for searches that nobody makes here.
RECIPES: dict[str, _Recipe] = {
    "flat": _Recipe(about="exact, fp32", factory=lambda r, d: "Flat", sample=lambda r: 0),
    "fp16": _Recipe(about="16 bits a number", factory=lambda r, d: "SQfp16", sample=lambda r: 0),
    "sq8": _Recipe(about="8 bits a number", factory=lambda r, d: "SQ8"),
    "sq6": _Recipe(about="6 bits a number", factory=lambda r, d: "SQ6"),
    "sq4": _Recipe(about="4 bits a number", factory=lambda r, d: "SQ4"),
    "pq": _Recipe(about="8 bits for 4 numbers", factory=lambda r, d: f"PQ{_parts(d)}np", min_rows=256),
    "opq_pq": _Recipe(
        about="the same, rotated first", factory=lambda r, d: f"OPQ{_parts(d)},PQ{_parts(d)}np", min_rows=256
    ),
    "pq_fastscan": _Recipe(
        about="4 bits for 4 numbers, in registers", factory=lambda r, d: f"PQ{_parts(d)}x4fs", min_rows=16
    ),
    "opq_pq_fastscan": _Recipe(
        about="the same, rotated first", factory=lambda r, d: f"OPQ{_parts(d)},PQ{_parts(d)}x4fs", min_rows=16
    ),
    "rabitq": _Recipe(about="6 bits a number, RaBitQ", factory=lambda r, d: "RaBitQfs6"),
    "rabitq1": _Recipe(about="1 bit a number, RaBitQ", factory=lambda r, d: "RaBitQfs"),
    "ivf_flat": _ivf("lists of exact vectors", lambda d: "Flat"),
    "ivf_fp16": _ivf("lists, 16 bits a number", lambda d: "SQfp16"),
    "ivf_sq8": _ivf("lists, 8 bits a number", lambda d: "SQ8"),
    "ivf_pq": _ivf("lists, 8 bits for 4 numbers", lambda d: f"PQ{_parts(d)}np", min_rows=256),
    "ivf_pq_fastscan": _ivf("lists, 4 bits for 4 numbers", lambda d: f"PQ{_parts(d)}x4fsr", min_rows=16),
    "ivf_rabitq": _ivf("lists, 6 bits a number, RaBitQ", lambda d: "RaBitQfs6"),
    "hnsw": _hnsw("graph over exact vectors", "Flat"),
    "hnsw_sq8": _hnsw("graph, 8 bits a number", "SQ8"),
}


def resolve_kind(name: str, *, rows: int, dim: int) -> DenseKind:
    """Return the kind called ``name`` for ``rows`` vectors of ``dim`` numbers.

    Raises `BuildError` with the nearest known name if there is none, and if there are too few rows to train.
    """
    recipe, store, settings = _read(name)
    if rows < recipe.min_rows:
        raise BuildError(
            f"{name} needs {recipe.min_rows} passages to train, this corpus has {rows}: choose flat or sq8"
        )
    search = recipe.search(rows) | ({"candidates": CANDIDATES} if store else {})
    kind = DenseKind(
        name=name,
        dim=dim,
        factory=recipe.factory(rows, dim),
        store=store,
        search=search | settings,
        sample=min(rows, recipe.sample(rows)),
    )
    configured_index(kind.factory, dim, kind.search)  # fails now rather than after the encoding
    return kind


def dense_index_problem(name: str) -> str | None:
    """Return why no dense index can be called ``name``, None if one can; FAISS is not asked."""
    try:
        _read(name)
    except BuildError as error:
        return str(error)
    return None


def _read(name: str) -> tuple[_Recipe, str | None, dict[str, int]]:
    """Return what a name says: the recipe, FAISS's name of the store, and search parameters."""
    base, *settings = name.split(":")
    small, plus, store = base.partition("+")
    if plus and store not in _STORES:
        raise BuildError(f"{name}: {store!r} is no store; choose one of {', '.join(_STORES)}")
    if small[:1].isupper():
        recipe = _Recipe(about="", factory=lambda r, d: small, sample=_ivf("", lambda d: "").sample)
    elif small in RECIPES:
        recipe = RECIPES[small]
    else:
        near = difflib.get_close_matches(small, RECIPES, n=1, cutoff=0.0)[0]
        raise BuildError(
            f"there is no dense index called {small!r}; did you mean {near!r}? (`searchrl index kinds` lists "
            "all; a FAISS description starts with a capital letter)"
        )
    return recipe, _STORES[store] if plus else None, _parse(settings, name)


def _parse(settings: list[str], name: str) -> dict[str, int]:
    found = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in _PARAMETERS or not value.isdecimal() or int(value) == 0:
            raise BuildError(
                f"{name}: {setting!r} is no search parameter; write one of {'=N, '.join(_PARAMETERS)}=N"
            )
        found[key] = int(value)
    return found


def configured_index(factory: str, dim: int, search: dict[str, int]) -> Any:
    """Return an empty FAISS index for inner products; raise `BuildError` if FAISS refuses."""
    library = faiss()
    try:
        index = library.index_factory(dim, factory, library.METRIC_INNER_PRODUCT)
        configure(index, search)
    except RuntimeError as error:
        reason = str(error).rpartition("Error: ")[2].rpartition(": ")[2]
        raise BuildError(f"FAISS refuses the index {factory!r} of {dim} numbers: {reason}") from error
    return index


def configure(index: Any, search: dict[str, int]) -> None:
    """Set the search-time parameters that FAISS knows; raise `RuntimeError` if the index has them not."""
    for key, value in search.items():
        if key != "candidates":
            faiss().ParameterSpace().set_index_parameter(index, key, value)


def is_streamed(factory: str) -> bool:
    """Whether an index of this kind is written to disk as it grows: its codes are all it holds."""
    return factory == "Flat" or (factory.startswith("SQ") and "," not in factory)


def cost(kind: DenseKind, *, rows: int) -> Cost:
    """Compute what ``kind`` costs, from the code sizes that FAISS states."""
    library = faiss()
    dim = kind.dim
    whole = configured_index(kind.factory, dim, {})  # it owns the index inside
    index, fixed = whole, 0
    if isinstance(whole, library.IndexPreTransform):
        fixed, index = 4 * dim * dim, library.downcast_index(whole.index)
    if isinstance(index, library.IndexIVF):
        each = index.code_size + 8
        fixed += 4 * dim * index.nlist
    elif isinstance(index, library.IndexHNSW):
        # 64 links at the bottom, 32 on each level above, where a 32nd is; a level and an offset.
        each = _code_size(library.downcast_index(index.storage)) + 4 * (64 + 32 / 31) + 4 + 8
    else:
        each = _code_size(index)
    held = round(each * rows) + fixed
    store = 0
    if kind.store is not None:
        store = configured_index(kind.store, dim, {}).sa_code_size() * rows
    building = kind.sample * dim * 4 + (0 if is_streamed(kind.factory) else held)
    return Cost(index=held, store=store, building=building)


def _code_size(index: Any) -> int:
    """Bytes of a vector; of an exotic index that does not say, those of the vector itself."""
    try:
        return int(index.sa_code_size())
    except RuntimeError:
        return 4 * int(index.d)
