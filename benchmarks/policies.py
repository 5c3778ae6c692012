"""Policies that benchmarks sample from: small, warm-started, so that they search."""

from __future__ import annotations

import subprocess
import sys

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
