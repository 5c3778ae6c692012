"""Policies of benchmarks: small and warm-started, so that they search; or of any size, random weights."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from searchrl.model_shape import ModelShape

POLICIES: dict[str, tuple[str, ...]] = {
    "tiny": ("+experiment=smoke",),
    "smollm2": ("+experiment=worldfacts",),
}
"""Overrides by name: a random two-layer Llama of 0.3 million parameters, and SmolLM2-135M."""


def warm_start(policy: str) -> str:
    """The folder of the warm-started ``policy``, made now unless it is cached."""
    command = [sys.executable, "-m", "searchrl.cli", "warmstart", *POLICIES[policy]]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    marker = "initial policy: "
    found = [line.partition(marker)[2] for line in said.stdout.splitlines() if marker in line]
    if said.returncode != 0 or not found:
        raise SystemExit(f"{' '.join(command)} failed:\n{said.stdout}\n{said.stderr}")
    return found[-1].strip()


def random_network(shape: ModelShape, device: str, **settings: Any) -> Any:
    """A Qwen2.5 of that shape with random weights in bf16; ``settings`` are of its configuration."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.is_tied,
        **settings,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
