"""Ranks and the engines that they hold."""

from __future__ import annotations

import pytest

from searchrl.distributed import World, derived_seed


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


def test_derived_seeds_are_functions_of_seed_and_key() -> None:
    # Written down: a run must go on with the same numbers after an upgrade.
    assert derived_seed(0, "0/0/0") == 326663281
    seeds = [derived_seed(seed, f"step {step}") for seed in range(10) for step in range(100)]
    assert len(set(seeds)) == 1000
    assert all(0 <= seed < 2**31 for seed in seeds)
