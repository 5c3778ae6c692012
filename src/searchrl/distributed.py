"""One rank's view of the others. Everything here also works in a single process without a launcher."""

from __future__ import annotations

import hashlib
import os
import random
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store
    from torch.distributed import ProcessGroup

T = TypeVar("T")


@dataclass(kw_only=True, slots=True, frozen=True)
class World:
    """Rank, number of ranks, device. Made by ``init_world``, before torch.distributed starts."""

    rank: int
    size: int
    local_rank: int
    device: str
    """``cpu`` or ``cuda:<local rank>``."""
    engine_size: int = 1
    """Consecutive ranks that hold one engine together."""
    timeout_s: float = 3600.0
    """Seconds after which a collective gives up: the last resort where `Heartbeat` does not speak."""

    @property
    def is_main(self) -> bool:
        """True on the rank that writes files and prints."""
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        """True on the rank that starts what its node shares."""
        return self.local_rank == 0

    def of_my_node(self, values: Sequence[T]) -> T:
        """Of values in rank order the one from this node's first rank: launchers number a node's in a row."""
        return values[self.rank - self.local_rank]

    @property
    def engines(self) -> int:
        """Number of engines; they share the questions."""
        return self.size // self.engine_size

    @property
    def engine_index(self) -> int:
        """Which of them this rank belongs to."""
        return self.rank // self.engine_size

    @property
    def leads_engine(self) -> bool:
        """True on the first rank of an engine, which runs its episodes."""
        return self.rank % self.engine_size == 0


def init_world(device: str, *, engine_size: int = 1, timeout_s: float = 3600.0) -> World:
    """Read what ``torchrun`` set, or set the same for a single process. Starts no communication.

    Args:
        device: ``cpu`` or ``cuda``.
        engine_size: ranks that hold one engine together; divides their number.
        timeout_s: for collectives.
    """
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    local_rank = int(os.environ["LOCAL_RANK"])
    return World(
        rank=int(os.environ["RANK"]),
        size=int(os.environ["WORLD_SIZE"]),
        local_rank=local_rank,
        device=f"cuda:{local_rank}" if device == "cuda" else "cpu",
        engine_size=engine_size,
        timeout_s=timeout_s,
    )


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch. Called again after the engine is built, which changes all three."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def derived_seed(seed: int, key: str) -> int:
    """A seed below 2^31 of its own for whatever ``key`` names: a function of the two alone."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=4).digest(), "big") >> 1


def reduce_values(values: Sequence[float], op: str) -> list[float]:
    """All-reduce numbers over the ranks in float64.

    Args:
        values: as many on every rank.
        op: ``sum``, ``min`` or ``max``.
    """
    import torch
    import torch.distributed as dist

    if not values or not dist.is_initialized() or dist.get_world_size() == 1:
        return list(values)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    tensor = torch.tensor(list(values), dtype=torch.float64, device=device)
    dist.all_reduce(tensor, getattr(dist.ReduceOp, op.upper()))
    return [float(value) for value in tensor.tolist()]


def side_group(size: int, timeout_s: float = 3600.0) -> ProcessGroup | None:
    """A gloo group of ``size`` consecutive ranks, this one among them, beside the trainer's collectives.

    Ranks must agree on the order of collectives within a group, which two threads cannot: an engine's
    messages and rollouts in a thread of their own have one each. None for a group of one. A collective of all
    ranks, whose number ``size`` divides. ``timeout_s`` is that of its collectives.
    """
    import torch.distributed as dist

    if size == 1:
        return None
    timeout = timedelta(seconds=timeout_s)
    group: ProcessGroup = dist.new_subgroups(group_size=size, backend="gloo", timeout=timeout)[0]
    return group


def gather_objects(value: T, group: ProcessGroup | None = None) -> list[T]:
    """Every rank's picklable value, in rank order, on every rank of ``group`` (None: of all)."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [value]
    values: list[T | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group)
    return values  # type: ignore[return-value]  # all slots are filled by the collective


def broadcast_object(value: T) -> T:
    """Rank 0's picklable value on every rank."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def open_store(world: World) -> Store:
    """A key-value store that all ranks share, beside their collectives. A collective.

    Rank 0 holds it, on a free port; it ends with that process.
    """
    from torch._C._distributed_c10d import HashStore, TCPStore  # the types that torch.distributed passes on

    if world.size == 1:
        return HashStore()
    host, timeout, port = os.environ["MASTER_ADDR"], timedelta(seconds=60), 0
    if world.is_main:
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        port = store.port
    port = broadcast_object(port)
    return store if world.is_main else TCPStore(host, port, wait_for_workers=False, timeout=timeout)


def barrier() -> None:
    """Wait for all ranks."""
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def destroy_groups() -> None:
    """End torch.distributed in this process, if it has been started."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
