"""Checks that load the run's parts. Each runs in a process of its own: a crash is a finding, like any other.

    python -m searchrl.doctor.parts CHECK FILE      # FILE: the configuration, pickled

Findings go to standard output as JSON, one a line.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from searchrl.config import Config, Device, DType, RetrievalKind
from searchrl.doctor.findings import Finding, failed, ok, warning
from searchrl.environment import prepare_environment
from searchrl.errors import SearchrlError
from searchrl.launcher import is_rank, join_launcher, launch, require_devices, tell_launcher, world_size
from searchrl.models import resolve_model
from searchrl.plan import GIB

TINY = "random:tiny"
"""The model of the probe, unless it is to be the run's own."""

WEB = (RetrievalKind.google, RetrievalKind.brave, RetrievalKind.searxng, RetrievalKind.mcp)


def gpus(cfg: Config) -> Iterator[Finding]:
    """Enough GPUs, with enough memory, and nobody else on them."""
    check = "gpus"
    if cfg.device is Device.cpu:
        yield ok(check, "not needed: device=cpu")
        return
    require_devices(cfg)
    import torch

    if not torch.cuda.is_available():
        text = (
            f"torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use the GPUs that the driver shows"
        )
        yield failed(check, text, "install the GPU build (`make setup EXTRA=gpu`), or a newer NVIDIA driver")
        return
    for number in range(world_size(cfg)):
        free, total = torch.cuda.mem_get_info(number)
        text = (
            f"{number}: {torch.cuda.get_device_name(number)}, {free / GIB:.0f} of {total / GIB:.0f} GiB free"
        )
        if cfg.model.dtype is DType.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
            yield failed(check, f"{text}; it has no bfloat16", "model.dtype=float32, or another GPU")
        elif free < 0.9 * total:
            yield warning(check, f"{text}: another process uses it", "`nvidia-smi` says which")
        else:
            yield ok(check, text)


def communication(cfg: Config) -> Iterator[Finding]:
    """An all-reduce among the run's ranks on this machine; on the CPU among two at least."""
    check = "communication"
    if not is_rank():
        ranks = world_size(cfg) if cfg.device is Device.cuda else max(2, world_size(cfg))
        launch(["-m", "searchrl.doctor.parts", *sys.argv[1:]], ranks)
        return
    import torch
    import torch.distributed as dist

    on_gpu = cfg.device is Device.cuda
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    tensor = torch.ones(2**26 if on_gpu else 2**20, device="cuda" if on_gpu else "cpu")
    dist.all_reduce(tensor)  # the first one connects
    size = dist.get_world_size()
    start = time.perf_counter()
    dist.all_reduce(tensor)
    low, high = float(tensor.min()), float(tensor.max())  # waits for the GPU
    seconds = time.perf_counter() - start
    dist.destroy_process_group()
    if os.environ["RANK"] == "0":
        name, megabytes = "NCCL" if on_gpu else "gloo", tensor.numel() * tensor.element_size() / 2**20
        text = f"{name} adds {megabytes:.0f} MiB over {size} rank(s) in {1000 * seconds:.0f} ms"
        if low == high == size**2:
            yield ok(check, text)
        else:
            hint = "NCCL_P2P_DISABLE=1 shows whether the links between GPUs are at fault"
            yield failed(check, f"{text}, but to {low:g} … {high:g} in place of {size**2}", hint)


def retriever(cfg: Config) -> Iterator[Finding]:
    """The source of search results answers one search.

    The web is not asked, since that costs, nor a tool of one's own, which may not know what a search is.
    """
    import asyncio

    from searchrl.console import Console
    from searchrl.distributed import World
    from searchrl.retrieval.meter import RetrievalMeter
    from searchrl.sources import index_folder, open_retriever

    check, retrieval = "retriever", cfg.retrieval
    silent = (RetrievalKind.none, RetrievalKind.oracle, RetrievalKind.replay, RetrievalKind.custom)
    if retrieval.kind in (*WEB, *silent):
        yield ok(check, f"retrieval={retrieval.kind}: not asked; its settings are part of `configuration`")
        return
    if retrieval.kind is RetrievalKind.embedded and not (index_folder(cfg) / "manifest.json").is_file():
        if retrieval.index_path:
            hint = "make one with `searchrl index build`, or leave retrieval.index_path empty"
            yield failed(check, f"{retrieval.index_path} holds no index", hint)
        else:
            text = (
                f"{index_folder(cfg)} is not built yet: the first run does that, in seconds or (dense) hours"
            )
            yield warning(check, text, "`searchrl index build` does it beforehand, for retrieval.index_path")
        return
    world = World(rank=0, size=1, local_rank=0, device=str(cfg.device))
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner() as runner:
        cfg.run_dir, retrieval.cache, retrieval.patience_s = folder, "", 0.0
        meter = RetrievalMeter()
        with open_retriever(cfg, world, Console(enabled=False), runner, meter) as source:
            start = time.perf_counter()
            found = runner.run(source.retriever.search("capital of Ghana", 3))
            seconds = time.perf_counter() - start
    where = ", ".join(retrieval.urls) or f"{retrieval.index} index"
    yield ok(check, f"{where}: {len(found)} documents in {1000 * seconds:.0f} ms")


def model(cfg: Config) -> Iterator[Finding]:
    """The tokenizer renders a prompt, and the weights are there and whole."""
    from searchrl.protocol import Protocol, load_tokenizer
    from searchrl.trajectory import Example

    check, name = "model", cfg.checkpoint or cfg.model.path
    source = resolve_model(name, Path(cfg.assets))
    example = Example(id="0", question="Where?", golden_answers=("there",), data_source="doctor")
    prompt = Protocol(load_tokenizer(source), cfg.episode).prompt(example)
    yield ok(check, f"the tokenizer of {name} makes a prompt of {len(prompt)} tokens")
    if not isinstance(source, Path):
        from huggingface_hub import try_to_load_from_cache

        files = ("model.safetensors", "model.safetensors.index.json")
        if not any(isinstance(try_to_load_from_cache(name, file), str) for file in files):
            yield warning(
                check, f"the weights of {name} are not here yet", f"the run, or `hf download {name}`"
            )
        return
    from safetensors import SafetensorError, safe_open

    tensors = 0
    for file in sorted(source.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as weights:
                tensors += len(weights.keys())
        except SafetensorError as error:
            yield failed(
                check, f"{file} is no whole file of weights: {error}", f"make or copy {source} again"
            )
            return
    if tensors:
        yield ok(check, f"{tensors} tensors in {source}")
    else:
        yield failed(check, f"{source} holds no *.safetensors", "write it with save_pretrained")


def probe(cfg: Config, *, tiny: bool = True) -> Iterator[Finding]:
    """The engine and the trainer load a model, sync, and agree on log-probabilities."""
    import asyncio

    from searchrl.actor import init_communication
    from searchrl.distributed import init_world
    from searchrl.protocol import Protocol, load_tokenizer
    from searchrl.setup import load_actor, load_engine
    from searchrl.trajectory import Example
    from searchrl.weight_sync import WeightSync

    if not is_rank() and world_size(cfg) > 1:
        launch(["-m", "searchrl.doctor.parts", *sys.argv[1:]], world_size(cfg))
        return
    if tiny:
        cfg.checkpoint, cfg.model.path = "", TINY
        cfg.episode.max_context_tokens = min(cfg.episode.max_context_tokens, 4096)
        cfg.engine.kv_cache_gib = min(cfg.engine.kv_cache_gib, 0.25)
    source = resolve_model(cfg.checkpoint or cfg.model.path, Path(cfg.assets))
    world = init_world(cfg.device, engine_size=1 if tiny else cfg.engine.tensor_parallel)
    init_communication(world)
    protocol = Protocol(load_tokenizer(source), cfg.episode)
    example = Example(id="0", question="Where? " * 16, golden_answers=("there",), data_source="doctor")
    limit = cfg.episode.max_context_tokens
    engine, actor = load_engine(cfg, source, world), load_actor(cfg, source, world)
    prompts = [protocol.prompt(example)[: limit - cfg.sync.probe_tokens]]
    sync = WeightSync(
        actor=actor, engine=engine, config=cfg.sync, temperature=cfg.sampling.temperature, prompts=prompts
    )
    with asyncio.Runner() as runner:
        stats = sync(runner, version=0)
    if world.is_main:
        bound = f"{stats.probe_max_abs_diff:.2g} nats apart, {cfg.sync.probe_max_abs_diff:g} are allowed"
        yield ok("probe", f"engine and trainer hold {cfg.model.path} alike: {bound}")


def deep_probe(cfg: Config) -> Iterator[Finding]:
    """`probe` with the run's own model."""
    return probe(cfg, tiny=False)


PARTS: dict[str, Callable[[Config], Iterator[Finding]]] = {
    "gpus": gpus,
    "communication": communication,
    "retriever": retriever,
    "model": model,
    "probe": probe,
    "deep_probe": deep_probe,
}
"""By the name that the command line above takes."""


def main(name: str, file: Path) -> None:
    """Run one check; a typed error is its finding."""
    join_launcher()
    cfg = pickle.loads(file.read_bytes())
    prepare_environment(str(cfg.device))
    try:
        for finding in PARTS[name](cfg):
            print(json.dumps(asdict(finding)), flush=True)
    except SearchrlError as error:
        if tell_launcher(str(error), 1):
            raise SystemExit(1) from None
        print(json.dumps(asdict(failed(name.removeprefix("deep_"), str(error)))), flush=True)
    except Exception:  # of whatever kind: the launcher prints it, or it goes on
        if not tell_launcher(traceback.format_exc(), 1):
            raise
        raise SystemExit(1) from None


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
