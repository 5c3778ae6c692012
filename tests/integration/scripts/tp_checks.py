"""Two ranks hold an engine together: ``tp_checks OUT MODEL [UNTIED [DEVICE]]``; its last check makes it fail.

With four ranks there are two engines, and both are checked.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any
from unittest.mock import patch

import searchrl.engine
from integration.scripts.common import write_results
from integration.scripts.engine_checks import crowd, early_end, plain, request, together
from integration.scripts.weight_sync_checks import Bench, build, synced
from searchrl.config import DType
from searchrl.distributed import gather_objects
from searchrl.engine import Engine, EngineError, GenerationRequest
from searchrl.engine.requests import sampling_params


def said(bench: Bench, work: Coroutine[Any, Any, list[object]]) -> list[dict[str, object]]:
    """How ``work`` ended on each rank, and how long after a common start."""
    start = min(gather_objects(time.time()))
    try:
        bench.engine.run(bench.runner, work)
        outcome = "nothing"
    except BaseException as error:
        outcome = repr(error)
    return gather_objects({"outcome": outcome, "seconds": time.time() - start})


def generations(bench: Bench, temperature: float) -> list[list[dict[str, object]]]:
    """Those of a crowd of requests, by rank."""
    return gather_objects(plain(bench.engine.run(bench.runner, together(bench.engine, crowd(temperature)))))


async def bad_episode(engine: Engine) -> list[object]:
    """One fails while another generates."""
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(engine.generate(request([1, 2, 3], tokens=400, temperature=1.0, seed=1)))
        await asyncio.sleep(0.1)
        raise LookupError("no such page")


async def some(engine: Engine) -> list[object]:
    """A few generations of one length: they end in the same step whatever is sampled."""
    requests = [request([n, 1, 2], tokens=12, temperature=1.0, seed=n) for n in range(4)]
    return list(await asyncio.gather(*map(engine.generate, requests)))


def outside(bench: Bench) -> str:
    """What a rank is told that generates without the others."""
    try:
        bench.runner.run(bench.engine.generate(request([1], tokens=1, temperature=0.0, seed=0)))
    except EngineError as error:
        return str(error)
    return "nothing"


def broken_step() -> None:
    """In place of the engine's."""
    raise RuntimeError("out of paper")


def other_seeds(bench: Bench) -> list[dict[str, object]]:
    """The second rank of an engine samples with seeds of its own."""

    def other(one: GenerationRequest, *, streams: bool) -> Any:
        params = sampling_params(one, streams=streams)
        params.seed += 0 if bench.world.leads_engine else 1000
        return params

    with patch.object(searchrl.engine, "sampling_params", other):
        outcomes = said(bench, some(bench.engine))
    bench.engine.reset_prefix_cache()  # of what the ranks cached, they know different tokens
    return outcomes


def main(out: Path, model: Path, device: str) -> None:
    """Run all checks."""
    dtype = DType.float32 if device == "cpu" else DType.bfloat16
    bench = build(model, 3, device=device, dtype=dtype, engine_size=2)
    engine, runner = bench.engine, bench.runner
    results: dict[str, object] = {
        "leaders": gather_objects(bench.world.leads_engine),
        "limits": [one.max_tokens for one in crowd(0.0)],
        "greedy": generations(bench, 0.0),
        "sampled": generations(bench, 1.0),
        "early end": gather_objects(early_end(engine, model, runner)),
        "outside": gather_objects(outside(bench)),
        "bad episode": said(bench, bad_episode(engine)),
        "other seeds": other_seeds(bench),
        "afterwards": generations(bench, 0.0),
        "sync": synced(bench),
        "failing at": time.time(),
    }
    if bench.world.is_main:
        write_results(out, results)
    if not bench.world.leads_engine:
        engine._engine.step = broken_step
    engine.run(runner, some(engine))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[4] if len(sys.argv) > 4 else "cpu")
