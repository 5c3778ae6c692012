"""How big a model is, without loading it: from its ``config.json``, or from a table of published ones.

The decoders that the table and the formula cover share one architecture: RMSNorm, grouped-query attention
with rotary positions, a gated MLP (Llama, arXiv 2302.13971; Qwen2.5, arXiv 2412.15115).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from searchrl.models import ModelError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""``model_type`` of the architectures that the formula covers."""


@dataclass(kw_only=True, slots=True, frozen=True)
class ModelShape:
    """Sizes of a decoder."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    is_tied: bool
    """The head is the embedding."""
    has_qkv_bias: bool = False
    has_qk_norm: bool = False
    """Queries and keys are normalised per head (Qwen3)."""

    @property
    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """(in, out) of a layer's weight matrices."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, queries),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (queries, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def parameters(self) -> int:
        """All of them; a tied head counts once."""
        layer = sum(rows * columns for rows, columns in self.linear_layers.values()) + 2 * self.hidden
        if self.has_qkv_bias:
            layer += (self.heads + 2 * self.kv_heads) * self.head_dim
        if self.has_qk_norm:
            layer += 2 * self.head_dim
        embeddings = self.vocabulary * self.hidden * (1 if self.is_tied else 2)
        return embeddings + self.layers * layer + self.hidden

    def adapter_parameters(self, rank: int, targets: Sequence[str]) -> int:
        """Of LoRA adapters A [rank, in] and B [out, rank] on ``targets``; empty: on every linear layer."""
        sizes = [sum(size) for name, size in self.linear_layers.items() if not targets or name in targets]
        return self.layers * rank * sum(sizes)


def _qwen25(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int) -> ModelShape:
    is_large = hidden > 2048  # from 7B on: an untied head, and a vocabulary padded further
    return ModelShape(
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads,
        vocabulary=152_064 if is_large else 151_936,
        is_tied=not is_large,
        has_qkv_bias=True,
    )


_QWEN25 = {
    "0.5B": _qwen25(24, 896, 4864, 14, 2),
    "3B": _qwen25(36, 2048, 11008, 16, 2),
    "7B": _qwen25(28, 3584, 18944, 28, 4),
}
_SMOLLM2 = ModelShape(
    layers=30,
    hidden=576,
    intermediate=1536,
    heads=9,
    kv_heads=3,
    head_dim=64,
    vocabulary=49_152,
    is_tied=True,
)
_TINY = ModelShape(
    layers=2,
    hidden=128,
    intermediate=256,
    heads=4,
    kv_heads=2,
    head_dim=32,
    vocabulary=299,
    is_tied=True,
)
KNOWN_SHAPES = {
    **{f"Qwen/Qwen2.5-{size}{kind}": s for size, s in _QWEN25.items() for kind in ("", "-Instruct")},
    "package:smollm2-135m": _SMOLLM2,
    "random:tiny": _TINY,
    "random:tiny-untied": replace(_TINY, is_tied=False),
}
"""What models of the shipped experiments say in their ``config.json``: their plan needs no download."""

_CONTEXTS = dict.fromkeys(("package:smollm2-135m", "random:tiny", "random:tiny-untied"), 8192)
"""Of those of them that have a folder only once they are built: their ``max_position_embeddings``."""


def find_shape(model: str) -> ModelShape | None:
    """The shape of ``model.path`` if the table or a ``config.json`` on this machine knows it, else None.

    The file may stand in a folder or in the hub's cache; nothing is downloaded or built.

    Raises:
        ModelError: a ``config.json`` cannot be read.
    """
    # Not the table first: loading, too, takes a folder of a hub model's name.
    if model in KNOWN_SHAPES and not Path(model).expanduser().is_dir():
        return KNOWN_SHAPES[model]
    path = _config_file(model)
    return None if path is None else read_shape(path)


def context_limit(model: str) -> int | None:
    """How many tokens the model can read, if the table or a ``config.json`` on this machine says so.

    None also where positions are scaled: then the engine knows how far.

    Raises:
        ModelError: a ``config.json`` cannot be read.
    """
    if model in _CONTEXTS:
        return _CONTEXTS[model]
    path = _config_file(model)
    if path is None:
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
        limit = config.get("max_position_embeddings")
        return None if limit is None or "factor" in rope else int(limit)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise _unreadable(path, error) from error


def _config_file(model: str) -> Path | None:
    """The model's ``config.json`` in its folder, else in the hub's cache."""
    folder = Path(model).expanduser()
    if model and folder.is_dir():
        return folder / "config.json"
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(model, "config.json")
    except ValueError:  # no hub name either; loading says so
        return None
    return Path(cached) if isinstance(cached, str) else None


def _unreadable(path: Path, error: Exception) -> ModelError:
    return ModelError(
        f"{path} is no model configuration ({error!r}); name another folder, or write it again with "
        "save_pretrained"
    )


def read_shape(path: Path) -> ModelShape | None:
    """The shape that a ``config.json`` describes; None for an architecture other than ``FAMILIES``.

    Raises:
        ModelError: it is no JSON object, or a size is missing.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        family = config.get("model_type")
        if family not in FAMILIES:
            return None
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        return ModelShape(
            layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            intermediate=int(config["intermediate_size"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            vocabulary=int(config["vocab_size"]),
            is_tied=bool(config.get("tie_word_embeddings", False)),
            has_qkv_bias=family == "qwen2" or bool(config.get("attention_bias", False)),
            has_qk_norm=family == "qwen3",
        )
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise _unreadable(path, error) from error
