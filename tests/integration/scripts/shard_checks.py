"""Checkpoints of real actors: the next step is the same, at every stage, after a change of stage or of ranks.

Run by ``update_checks``, on two ranks after one: those read what that one saved. ``shard_checks OUT MODEL
DEVICE`` runs alone, on a GPU as well.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from integration.scripts.common import write_results
from integration.scripts.offload_checks import CASES, Bench, same
from searchrl.actor import Actor, init_communication
from searchrl.config import DType
from searchrl.distributed import World, barrier, init_world

ELSEWHERE = {  # read at another stage
    "zero0": (3, DType.float32),
    "zero3/fp32": (0, DType.float32),
    "zero1": (3, DType.bfloat16),
    "zero3": (2, DType.bfloat16),
}
FROM_ONE_RANK = ("zero0", "zero2", "zero3", "zero3/fp32")


def save_actor(actor: Actor, folder: Path, world: World) -> None:
    """All ranks' shares in one new folder."""
    if world.is_main:
        folder.mkdir(parents=True)
    barrier()
    actor.save(folder)
    barrier()


def state(actor: Actor) -> dict[str, Tensor]:
    """Weights as the engine gets them, and first moments, by name."""
    moments = {f"moment {name}": tensor for name, tensor in actor.first_moments().items()}
    return {name: tensor.clone().contiguous() for name, tensor in actor.named_weights()} | moments


def check_case(out: Path, name: str, model: Path, world: World) -> dict[str, Any]:
    """Two updates, a checkpoint, a third; and the third once more from the checkpoint."""
    case, folder = CASES[name], out / name.replace("/", "-")
    fresh = folder.with_suffix(".fresh")
    bench = Bench(model, *case, world, offloads=False)
    save_actor(bench.actor, fresh, world)
    bench.update(0)
    first = state(bench.actor)
    bench.update(1)
    save_actor(bench.actor, folder, world)
    expected = state(bench.actor)
    if world.is_main:
        save_file({key: tensor.cpu() for key, tensor in expected.items()}, folder / "expected")
    bench.update(2)

    again = Bench(model, *case, world, offloads=True)
    again.actor.load(fresh)
    again.update(0)
    result: dict[str, Any] = {
        "from the beginning": same(state(again.actor), first),
        "an update matters": not same(first, expected),
    }
    again = Bench(model, *case, world, offloads=True)
    again.actor.load(folder)
    result["loaded"] = same(state(again.actor), expected)
    again.actor.offload()
    again.actor.reload()
    again.update(2)
    result["continued"] = same(state(again.actor), state(bench.actor))
    result["error"] = error(state(again.actor), state(bench.actor))
    if name in ELSEWHERE:
        other = Bench(model, *ELSEWHERE[name], world, offloads=False)
        other.actor.load(folder)
        result["loaded elsewhere"] = same(state(other.actor), expected)
        other.update(2)
        result["error elsewhere"] = error(state(other.actor), state(bench.actor))
    return result


def check_ranks(saved: Path, name: str, model: Path, world: World) -> bool:
    """What another number of ranks saved."""
    bench, folder = Bench(model, *CASES[name], world, offloads=False), saved / name.replace("/", "-")
    bench.actor.load(folder)
    return same(state(bench.actor), load_file(folder / "expected"))


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference."""
    return max(float((found[name] - tensor).abs().max()) for name, tensor in expected.items())


def check(out: Path, first: Path, model: Path, world: World) -> dict[str, Any]:
    """Every case on all ranks; ``first`` is the folder of the run on one rank."""
    results = {name: check_case(out / "shards", name, model, world) for name in CASES}
    if world.size > 1:
        for name in FROM_ONE_RANK:
            results[name]["from one rank"] = check_ranks(first / "shards", name, model, world)
    return results


def main(out: Path, model: Path, device: str) -> None:
    """Check alone."""
    world = init_world(device)
    init_communication(world)
    write_results(out, check(out, out, model, world))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
