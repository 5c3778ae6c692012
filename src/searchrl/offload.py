"""Tensors that leave the device for a while, unnoticed by all who hold them.

Optimizers hold views of views of the same memory: to move tensors one by one would leave some behind, and the
memory with them. So storages are emptied and filled again in place, as FSDP does between two uses.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, UntypedStorage


class Offloaded:
    """What is on the host. Until ``reload`` nobody may touch the tensors: they have no memory."""

    def __init__(self, tensors: Iterable[Tensor], *, scratch: Iterable[Tensor] = ()) -> None:
        """Copy to the host and free the device's memory.

        Args:
            tensors: these, and whatever shares memory with them.
            scratch: the same of buffers whose content is of no use any more: they come back uninitialised.
        """
        self._scratch = [(storage, storage.nbytes()) for storage in storages(scratch)]
        self._copies: list[tuple[UntypedStorage, Tensor]] = []
        for storage in storages(tensors):
            pinned = storage.device.type == "cuda"  # several times as fast
            host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pinned)
            host.untyped_storage().copy_(storage, non_blocking=False)
            self._copies.append((storage, host))
        self.release()

    @property
    def host_bytes(self) -> int:
        """What stands on the host."""
        return sum(host.nbytes for _, host in self._copies)

    @property
    def freed_bytes(self) -> int:
        """What the device gained."""
        return self.host_bytes + sum(size for _, size in self._scratch)

    def reload(self) -> None:
        """Everything is where it was, bit by bit."""
        for storage, size in self._scratch:
            storage.resize_(size)
        for storage, host in self._copies:
            storage.resize_(host.nbytes)
            storage.copy_(host.untyped_storage(), non_blocking=False)

    def release(self) -> None:
        """Free the device's memory once more; the tensors must not have changed since they were copied."""
        freed = [storage for storage, _ in [*self._copies, *self._scratch]]
        for storage in freed:
            storage.resize_(0)
        if any(storage.device.type == "cuda" for storage in freed):
            torch.cuda.empty_cache()  # vLLM takes memory from the device, not from torch


def storages(tensors: Iterable[Tensor]) -> list[UntypedStorage]:
    """The memory behind tensors, each piece once; empty ones have none."""
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return [storage for address, storage in found.items() if address]
