"""Ranks and the engines that they hold."""

from __future__ import annotations

import pytest

from searchrl.distributed import World


@pytest.mark.parametrize(
    ("size", "engine_size", "engines", "leaders"),
    [
        (1, 1, [0], [0]),
        (4, 1, [0, 1, 2, 3], [0, 1, 2, 3]),
        (4, 2, [0, 0, 1, 1], [0, 2]),
        (8, 4, [0, 0, 0, 0, 1, 1, 1, 1], [0, 4]),
    ],
)
def test_neighbours_hold_an_engine(
    size: int, engine_size: int, engines: list[int], leaders: list[int]
) -> None:
    ranks = [
        World(rank=n, size=size, local_rank=n, device="cpu", engine_size=engine_size) for n in range(size)
    ]
    assert [rank.engine_index for rank in ranks] == engines
    assert [rank.rank for rank in ranks if rank.leads_engine] == leaders
    assert {rank.engines for rank in ranks} == {len(set(engines))}
