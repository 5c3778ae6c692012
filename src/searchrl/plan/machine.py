"""How much memory this machine has for a rank. Imports no torch: it is asked before anything loads."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from searchrl.config import Device


@dataclass(kw_only=True, slots=True, frozen=True)
class Memory:
    """What one rank may use, in bytes; None: this machine does not say."""

    device: int | None
    """Of its GPU, or its share of main memory on a CPU."""
    host: int | None
    """Its share of main memory that is free now."""
    source: str
    """Where ``device`` comes from, for messages."""


def rank_memory(device: Device, local_ranks: int, *, root: Path = Path("/")) -> Memory:
    """The memory of each of ``local_ranks`` ranks of this machine, the smallest of them.

    Args:
        device: where ranks live.
        local_ranks: ranks on this machine.
        root: of the file system; for tests.
    """
    available = main_memory(root)
    host = None if available is None else available // local_ranks
    if device is Device.cpu:
        return Memory(device=host, host=host, source=f"free main memory / {local_ranks} ranks")
    gpu = gpu_memory()
    return Memory(device=gpu, host=host, source="the GPU's memory")


def gpu_memory() -> int | None:
    """Bytes of the smallest visible GPU; None if ``nvidia-smi`` does not say, as on a part of one (MIG).

    The driver's own tool, because asking through CUDA would create a context first.
    """
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible:
        command.append(f"--id={visible}")
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        sizes = [int(line) * 2**20 for line in answer.split("\n") if line.strip()]
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return min(sizes, default=None)


def main_memory(root: Path = Path("/")) -> int | None:
    """Bytes that processes can still get here: ``MemAvailable``, or less if a control group says so."""
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # no Linux
        return None
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return min([*free, *_group_rooms(root)], default=None)


def _group_rooms(root: Path) -> Iterator[int]:
    """What the limits of this process's control groups, version 1 and 2, and of their parents leave."""
    try:
        memberships = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for membership in memberships:
        number, controllers, name = membership.split(":", 2)
        if number == "0":
            base, limit, usage = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, limit, usage = (
                root / "sys/fs/cgroup/memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
            )
        else:
            continue
        # In a container the path is the host's, and the group itself is mounted at the base.
        folder = base / name.lstrip("/")
        for group in [folder, *folder.parents]:
            if group.is_relative_to(base) and (group / limit).is_file():
                text = (group / limit).read_text(encoding="ascii").strip()
                if text != "max":
                    used = int((group / usage).read_text(encoding="ascii")) - _file_cache(group)
                    yield max(0, int(text) - used)


def _file_cache(group: Path) -> int:
    """Bytes of the group's page cache, which is given up when memory is asked for."""
    rows = (line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
    stat = {name: int(value) for name, value in rows}
    names = ("inactive_file", "active_file")
    return sum(stat.get(f"total_{name}", stat.get(name, 0)) for name in names)
