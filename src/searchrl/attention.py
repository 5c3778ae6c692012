"""Attention over rows whose trajectories share prefixes, with torch's fused kernels and without a mask.

A row of n distinct prefixes is computed once in every layer but inside attention: there the queries, keys and
values of each trajectory are looked up, so that it attends causally along its own path, and the results are
read where a prefix first stands. A mask over the whole row would cost n² and keep the fast kernels away;
this costs the sum of the trajectories' lengths squared, halved.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from searchrl.config import ConfigError

ALONG_PATHS = "along_paths"
"""Its name for transformers, which makes no mask for a function that it does not know."""


def attend_along_paths(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    paths: Tensor | None = None,
    place: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What a decoder layer calls, with D numbers a head.

    Args:
        module: the layer's attention.
        query: [1, heads, n, D]; without ``paths`` [B, heads, T, D], causal, padded on the right.
        key: [1, kv_heads, n, D].
        value: [1, kv_heads, n, D].
        attention_mask: None.
        paths: long [S, L], see ``batching.PrefixTree``.
        place: long [n], likewise.
        sliding_window: how far back the layer may look; None: to the beginning.
        kwargs: the layer's scaling and dropout.

    Returns:
        [1, n, heads, D], and no weights.

    Raises:
        ConfigError: a sequence is longer than ``sliding_window``.
    """
    longest = query.shape[2] if paths is None else paths.shape[1]
    if sliding_window is not None and longest > sliding_window:
        raise ConfigError(
            f"a layer attends to {sliding_window} tokens at most, but a trajectory has up to {longest}: "
            "set episode.max_context_tokens below it, or model.attention=flash_attention_2"
        )
    if paths is None or place is None:
        return sdpa_attention_forward(module, query, key, value, None, **kwargs)
    flat, shape = paths.flatten(), paths.shape

    def look_up(states: Tensor) -> Tensor:
        """[1, heads, n, D] to [S, heads, L, D]."""
        looked_up: Tensor = states[0].index_select(1, flat).unflatten(1, shape)
        return looked_up.transpose(0, 1)

    attended, _ = sdpa_attention_forward(module, look_up(query), look_up(key), look_up(value), None, **kwargs)
    return attended.flatten(0, 1).index_select(0, place).unsqueeze(0), None


AttentionInterface.register(ALONG_PATHS, attend_along_paths)
