"""Pieces of parameters come back whole, however they were cut when saved and are cut when read."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import searchrl.shards
from searchrl.shards import Piece, ShardError, read_pieces, saved_steps, write_pieces

KINDS = ("weight", "exp_avg", "exp_avg_sq")
SIZES = {"a.weight": 7, "b.weight": 1, "c:odd/name": 12}


def parameters(seed: int) -> dict[str, dict[str, Tensor]]:
    """By kind and name."""
    generator = torch.Generator().manual_seed(seed)
    return {
        kind: {name: torch.randn(size, generator=generator) for name, size in SIZES.items()} for kind in KINDS
    }


def cut(state: dict[str, dict[str, Tensor]], bounds: list[int]) -> list[list[Piece]]:
    """The ranks' pieces, where ``bounds`` cut the parameters laid end to end."""
    shares, edges = [], [0, *sorted(bounds), sum(SIZES.values())]
    for low, high in pairwise(edges):
        pieces, offset = [], 0
        for name, size in SIZES.items():
            start, end = max(low - offset, 0), min(high - offset, size)
            if start < end:
                tensors = {kind: state[kind][name][start:end] for kind in KINDS}
                pieces.append(Piece(name=name, start=start, size=size, tensors=tensors))
            offset += size
        shares.append(pieces)
    return shares


BOUNDS = st.lists(st.integers(0, sum(SIZES.values())), max_size=5)


@settings(deadline=None, max_examples=50)  # a busy disk is no failure
@given(BOUNDS, BOUNDS, st.integers(1, 200))
def test_what_any_ranks_wrote_any_others_read(saved: list[int], read: list[int], max_bytes: int) -> None:
    written, found = parameters(0), parameters(1)
    before = searchrl.shards.MAX_FILE_BYTES
    searchrl.shards.MAX_FILE_BYTES = max_bytes
    try:
        with TemporaryDirectory() as name:
            for rank, pieces in enumerate(cut(written, saved)):
                write_pieces(pieces, Path(name), rank=rank, steps=3)
            assert all(path.stat().st_size < max_bytes + 1000 for path in Path(name).iterdir())
            for pieces in cut(found, read):
                read_pieces(pieces, Path(name))
            assert saved_steps(Path(name)) == 3
    finally:
        searchrl.shards.MAX_FILE_BYTES = before
    for kind in KINDS:
        assert all(torch.equal(found[kind][name], written[kind][name]) for name in SIZES)


@pytest.mark.parametrize(
    ("wanted", "lacking"),
    [
        (Piece(name="a", start=0, size=6, tensors={"weight": torch.zeros(6)}), "weight of a"),
        (Piece(name="a", start=0, size=4, tensors={"weight": torch.zeros(4)}), "weight of a"),
        (Piece(name="a", start=0, size=5, tensors={"exp_avg": torch.zeros(5)}), "exp_avg of a"),
        (Piece(name="b", start=0, size=5, tensors={"weight": torch.zeros(5)}), "weight of b"),
    ],
)
def test_what_is_missing_or_has_another_size_is_named(tmp_path: Path, wanted: Piece, lacking: str) -> None:
    saved = Piece(name="a", start=0, size=5, tensors={"weight": torch.ones(5)})
    write_pieces([saved], tmp_path, rank=0, steps=0)
    with pytest.raises(ShardError) as caught:
        read_pieces([wanted], tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} does not hold what is trained here: missing or of another size: {lacking}"
    )


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="holds no weights"):
        saved_steps(tmp_path)


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    piece = Piece(name="a", start=0, size=5, tensors={"weight": torch.ones(5)})
    with pytest.raises(ShardError, match=r"gone/rank0000-0000\.safetensors cannot be written: "):
        write_pieces([piece], tmp_path / "gone", rank=0, steps=0)
