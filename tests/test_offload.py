"""Tensors leave and come back: memory falls, views stay views, bits stay bits."""

from __future__ import annotations

import torch

from searchrl.offload import Offloaded


def test_views_of_what_left_find_it_again() -> None:
    flat = torch.randn(1000)
    view, column = flat[10:20], flat[:100].view(10, 10)[:, 3]
    expected = flat.clone()
    offloaded = Offloaded([view, flat, torch.empty(0)])
    assert offloaded.freed_bytes == offloaded.host_bytes == 4000, "once, however many share it"
    assert flat.untyped_storage().nbytes() == column.untyped_storage().nbytes() == 0
    offloaded.reload()
    assert torch.equal(flat, expected)
    assert torch.equal(view, expected[10:20])
    assert torch.equal(column, expected[:100].view(10, 10)[:, 3])
    flat.zero_()
    assert view.sum() == column.sum() == 0, "still the same memory"


def test_scratch_comes_back_in_size_alone() -> None:
    kept, scratch = torch.randn(10, dtype=torch.bfloat16), torch.ones(50, dtype=torch.float64)
    expected = kept.clone()
    offloaded = Offloaded([kept], scratch=[scratch])
    assert (offloaded.host_bytes, offloaded.freed_bytes) == (20, 420)
    assert scratch.untyped_storage().nbytes() == 0
    offloaded.reload()
    assert torch.equal(kept, expected)
    assert scratch.fill_(2.0).sum() == 100


def test_what_has_not_changed_is_released_again() -> None:
    weights = torch.randn(10)
    expected = weights.clone()
    offloaded = Offloaded([weights])
    for _ in range(2):
        offloaded.reload()
        assert torch.equal(weights, expected)
        offloaded.release()
        assert weights.untyped_storage().nbytes() == 0
