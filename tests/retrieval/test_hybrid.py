from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchrl.retrieval.hybrid import HybridIndex, fuse
from searchrl.retrieval.types import Hit


class Fixed:
    """An index that ranks given rows for any query."""

    def __init__(self, rows: list[int], size: int = 10) -> None:
        self.rows = rows
        self.size = size

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit]]:
        return [[Hit(row, -float(rank)) for rank, row in enumerate(self.rows)][:top_k] for _ in queries]


def test_fusion_by_hand() -> None:
    """Row: ranks in A and B. 7: 1, 3.  2: 2, 1.  5: 3, -.  4: -, 2."""
    index = HybridIndex([Fixed([7, 2, 5]), Fixed([2, 4, 7])])
    (hits,) = index.search(["q"], 10)
    assert [hit.row for hit in hits] == [2, 7, 4, 5]
    assert [hit.score for hit in hits] == pytest.approx([1 / 62 + 1 / 61, 1 / 61 + 1 / 63, 1 / 62, 1 / 63])


def test_weights_decide() -> None:
    a, b = Fixed([1, 2]), Fixed([2, 1])
    assert HybridIndex([a, b], weights=[2.0, 1.0]).search(["q"], 1)[0][0].row == 1
    assert HybridIndex([a, b], weights=[1.0, 2.0]).search(["q"], 1)[0][0].row == 2


def test_the_depth_bounds_the_candidates() -> None:
    """Row 3 is first in A and third in B; B's rank is not seen at depth 2."""
    index = HybridIndex([Fixed([3, 1, 2]), Fixed([1, 2, 3])], depth=2)
    assert dict(index.search(["q"], 1)[0]) == {1: pytest.approx(1 / 62 + 1 / 61)}
    assert dict(index.search(["q"], 2)[0])[3] == pytest.approx(1 / 61)
    assert len(index.search(["q"], 3)[0]) == 3


@given(st.permutations(range(6)), st.permutations(range(6)), st.permutations(range(6)))
def test_the_order_of_equal_indexes_does_not_matter(a: list[int], b: list[int], c: list[int]) -> None:
    rankings = [[Hit(row, 0.0) for row in rows] for rows in (a, b, c)]
    fused = fuse(rankings, [1.0] * 3, 6)
    assert fused == fuse(rankings[::-1], [1.0] * 3, 6)
    assert fused == sorted(fused, key=lambda hit: (-hit.score, hit.row))


def test_what_cannot_be_fused_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sizes are \[10, 11\]"):
        HybridIndex([Fixed([]), Fixed([], size=11)])
    with pytest.raises(ValueError, match="1 weights for 2 indexes"):
        HybridIndex([Fixed([]), Fixed([])], weights=[1.0])
