"""Gradients, golden numbers, offloading, scarce memory, guards, checkpoints.

``update_checks OUT TIED UNTIED FIRST``: ``FIRST`` is the folder of the run on one rank, whose checkpoints two
ranks read.
"""

from __future__ import annotations

import sys
from pathlib import Path

from integration.scripts import (
    golden_checks,
    gradient_checks,
    guard_checks,
    offload_checks,
    oom_checks,
    shard_checks,
)
from integration.scripts.common import write_results
from searchrl.actor import init_communication
from searchrl.distributed import init_world


def main(out: Path, tied: Path, untied: Path, first: Path) -> None:
    """Run all on all ranks."""
    world = init_world("cpu")
    init_communication(world)
    results = {
        "gradients": gradient_checks.check(out, tied, untied, world),
        "golden": golden_checks.check(tied, world),
        "offload": offload_checks.check(tied, world),
        "guards": guard_checks.check(out, tied, world),
        "oom": oom_checks.check(tied, world),
        "shards": shard_checks.check(out, first, tied, world),
    }
    if world.is_main:
        write_results(out, results)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:5]))
