from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from searchrl.retrieval.corpus import Corpus
from searchrl.retrieval.dense_build import write_flat
from searchrl.retrieval.encoder import Encoder, EncoderFamily, TextKind
from searchrl.retrieval.flatfile import faiss
from searchrl.retrieval.importing import import_index
from searchrl.retrieval.loading import load_index
from searchrl.retrieval.manifest import BuildError, IndexMismatchError, Manifest

Import = Callable[..., Manifest]


@pytest.fixture
def whole(contents: list[str], encoder_path: Path) -> bytes:
    """A flat index as FAISS writes it, of the corpus encoded as E5 would."""
    return flat(Encoder(encoder_path, EncoderFamily.E5).encode(contents, TextKind.PASSAGE))


def flat(vectors: np.ndarray, metric: str = "METRIC_INNER_PRODUCT") -> bytes:
    index = faiss().index_factory(vectors.shape[1], "Flat", getattr(faiss(), metric))
    index.add(vectors)
    return bytes(faiss().serialize_index(index))


def split(folder: Path, content: bytes, *at: int) -> list[Path]:
    bounds = [0, *at, len(content)]
    parts = []
    for number, (start, stop) in enumerate(pairwise(bounds)):
        parts.append(folder / f"part_a{'abcd'[number]}")
        parts[-1].write_bytes(content[start:stop])
    return parts


@pytest.fixture
def take(tmp_path: Path, corpus_path: Path, encoder_path: Path) -> Import:
    def take(parts: list[Path], **changes: Any) -> Manifest:
        arguments: dict[str, Any] = {
            "corpus_path": corpus_path,
            "encoder_path": encoder_path,
            "encoder_family": EncoderFamily.E5,
            "progress": False,
        }
        return import_index(parts, tmp_path / "out", **(arguments | changes))

    return take


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("move", [False, True])
def test_parts_become_an_index_like_our_own(
    tmp_path: Path, whole: bytes, take: Import, corpus_path: Path, encoder_path: Path, move: bool
) -> None:
    parts = split(tmp_path, whole, 3000, 5000)
    digest = hashlib.sha256(whole).hexdigest()
    manifest = take(parts, sha256=digest.upper(), rows=50, move=move)
    assert (tmp_path / "out/dense.faiss").read_bytes() == whole
    assert manifest.files["dense.faiss"].sha256 == digest
    assert left(tmp_path) == ["out"] if move else ["out", *(part.name for part in parts)]
    corpus = Corpus(corpus_path)
    for row in (0, 20, 49):
        (hits,) = load_index(tmp_path / "out", corpus).search([corpus[row].contents], 3)
        assert len(hits) == 3
    from searchrl.config import IndexKind
    from searchrl.retrieval.build import build_index

    own = build_index(
        corpus_path,
        tmp_path / "own",
        kind=IndexKind.dense,
        encoder_path=encoder_path,
        encoder_family=EncoderFamily.E5,
        progress=False,
    )
    assert (own.encoder, own.dense, own.rows, own.dim) == (
        manifest.encoder,
        manifest.dense,
        manifest.rows,
        manifest.dim,
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda w: w[:-4], "names 50 vectors of 32 numbers, 6,445 bytes; the parts have 6,441 together"),
        (
            lambda w: w + b"x",
            "the parts have 6,446 together: one is missing, incomplete or not the right one",
        ),
        (lambda w: w[3000:] + w[:3000], "is no flat FAISS index: it begins with"),
        (lambda w: b"IxSQ" + w[4:], "it begins with b'IxSQ', not b'IxFI'"),
        (
            lambda w: w[:37] + b"\0" * 8 + w[45:],
            "has a damaged header: 50 vectors of 32 numbers, but 0 numbers",
        ),
        (lambda w: flat(np.ones((50, 32), np.float32), "METRIC_L2"), "ranks by distance"),
        (lambda w: flat(np.ones((50, 16), np.float32)), "vectors of 16 numbers, but the encoder .* makes 32"),
        (lambda w: flat(np.ones((49, 32), np.float32)), "hold 49 vectors, but .* has 50 passages"),
    ],
)
def test_parts_that_are_something_else_are_refused_before_any_copy(
    tmp_path: Path, whole: bytes, take: Import, change: Callable[[bytes], bytes], reason: str
) -> None:
    parts = split(tmp_path, change(whole), 3000)
    with pytest.raises(IndexMismatchError, match=reason):
        take(parts, move=True)
    assert left(tmp_path) == ["part_aa", "part_ab"]


def test_wrong_expectations_are_refused(tmp_path: Path, whole: bytes, take: Import) -> None:
    parts = split(tmp_path, whole, 3000)
    with pytest.raises(IndexMismatchError, match="hold 50 vectors, not 21,015,324: these are other parts"):
        take(parts, rows=21_015_324)
    with pytest.raises(IndexMismatchError, match=r"have SHA-256 [0-9a-f]{64} together, not abc: fetch them"):
        take(parts, sha256="abc")
    assert left(tmp_path) == ["part_aa", "part_ab"], "fetched again, they are joined again"
    with pytest.raises(IndexMismatchError, match=r"no such part: .*part_ax"):
        take([parts[0], tmp_path / "part_ax"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis").touch()
    with pytest.raises(BuildError, match="holds no index: choose another directory"):
        take(parts)


@pytest.mark.parametrize(
    ("made_as", "reason"),
    [
        (
            lambda e, t: Encoder(e, EncoderFamily.BGE).encode(t, TextKind.PASSAGE),
            r"agree with how bge treats a passage \(1\.0000\): give --encoder-family bge",
        ),
        (
            lambda e, t: Encoder(e, EncoderFamily.E5).encode(t, TextKind.QUERY),
            r"agree with how e5 treats a query \(1\.0000\): they lack the passages' prefix",
        ),
        (
            lambda e, t: np.roll(Encoder(e, EncoderFamily.E5).encode(t, TextKind.PASSAGE), 2, axis=0),
            r"the vector of a passage lies 2 rows after it, so the corpus is in another order",
        ),
        (
            lambda e, t: np.random.default_rng(0).normal(size=(50, 32)),
            r"\(median cosine -?0\.\d+\): they were made by another encoder, or from another corpus",
        ),
        (
            lambda e, t: 3 * Encoder(e, EncoderFamily.E5).encode(t, TextKind.PASSAGE),
            r"have lengths of 3 to 3 where the encoder makes 1",
        ),
    ],
)
def test_vectors_of_other_making_are_recognised(
    tmp_path: Path,
    take: Import,
    encoder_path: Path,
    contents: list[str],
    made_as: Callable[[Path, list[str]], np.ndarray],
    reason: str,
) -> None:
    parts = split(tmp_path, flat(made_as(encoder_path, contents).astype(np.float32)), 3000)
    with pytest.raises(IndexMismatchError, match=reason):
        take(parts)


@pytest.mark.parametrize(
    ("move", "held"),
    [(False, 1000), (False, 3000), (False, 4000), (False, None), (True, 3000), (True, 4000), (True, None)],
)
def test_a_killed_import_goes_on(
    tmp_path: Path, whole: bytes, take: Import, move: bool, held: int | None
) -> None:
    """Half-way states as a kill leaves them: ``held`` bytes joined, or all, when only the check was left."""
    parts = split(tmp_path, whole, 3000, 5000)
    work = tmp_path / ".out.partial"
    work.mkdir()
    (work / "key.json").write_text(json.dumps({"import": [str(part) for part in parts]}))
    (work / "joined.parts").write_text(json.dumps({"sizes": [3000, 2000, len(whole) - 5000], "sha256": None}))
    (work / "joined.faiss").write_bytes(whole[:held])
    if move:
        (work / "moved").touch()
        parts[0].unlink()
    manifest = take(parts, move=move, sha256=hashlib.sha256(whole).hexdigest())
    assert manifest.rows == 50
    assert left(tmp_path) == ["out"] if move else ["out", *(part.name for part in parts)]


def test_moved_parts_are_never_lost(
    tmp_path: Path, whole: bytes, take: Import, corpus_path: Path, encoder_path: Path
) -> None:
    """A wrong family is found after the move: the same command with the right one goes on."""
    parts = split(tmp_path, whole, 3000)
    with pytest.raises(IndexMismatchError, match="give --encoder-family e5"):
        take(parts, move=True, encoder_family=EncoderFamily.BGE)
    from searchrl.config import IndexKind
    from searchrl.retrieval.build import build_index

    with pytest.raises(BuildError, match="holds index parts that another `searchrl index import --move`"):
        build_index(corpus_path, tmp_path / "out", kind=IndexKind.bm25)
    with pytest.raises(IndexMismatchError, match=r"the first is now at .*joined\.faiss"):
        take(parts, move=True, sha256="abc")
    assert take(parts, move=True).rows == 50
    assert left(tmp_path) == ["out"]


def test_the_header_we_write_is_faiss_s(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(7, 12)).astype(np.float32)
    write_flat(tmp_path / "ours", vectors)
    assert (tmp_path / "ours").read_bytes() == flat(vectors)
