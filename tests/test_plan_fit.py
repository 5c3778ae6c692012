"""Which plans are refused, and what would make them fit; what a machine has; plans beside measured peaks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from searchrl.cli import main
from searchrl.config import Config, ConfigError, Device
from searchrl.model_shape import KNOWN_SHAPES
from searchrl.plan import memory_rows, plan_memory
from searchrl.plan.fit import Case, refusal
from searchrl.plan.machine import Memory, gpu_memory, main_memory, rank_memory
from searchrl.plan.memory import GIB, Phase


def case(model: str, *, world_size: int, training: bool = True, **settings: Any) -> Case:
    cfg = Config(device=settings.get("device", Device.cuda))
    cfg.model.path, cfg.engine.kv_cache_gib = model, settings.get("kv_cache_gib", 8.0)
    cfg.batching.max_tokens, cfg.loss.kl_coef = settings.get("max_tokens", 4096), settings.get("kl_coef", 0.0)
    return Case(cfg=cfg, shape=KNOWN_SHAPES[model], world_size=world_size, training=training)


def available(gib: float, host_gib: float | None = None) -> Memory:
    host = None if host_gib is None else int(host_gib * GIB)
    return Memory(device=int(gib * GIB), host=host, source="a test's")


@pytest.mark.parametrize(
    ("plan", "gib"),
    [
        (case("Qwen/Qwen2.5-3B", world_size=8), 80),
        (case("Qwen/Qwen2.5-7B", world_size=8, kl_coef=0.001), 80),
        (case("Qwen/Qwen2.5-7B", world_size=8, training=False), 26),
        (case("package:smollm2-135m", world_size=1, device=Device.cpu, kv_cache_gib=1.0), 16),
    ],
)
def test_plans_that_fit_are_not_refused(plan: Case, gib: float) -> None:
    assert refusal(plan, available(gib, host_gib=64)) == ""


def test_what_is_unknown_is_not_refused() -> None:
    nothing = Memory(device=None, host=None, source="")
    assert refusal(case("Qwen/Qwen2.5-7B", world_size=1), nothing) == ""


@pytest.mark.parametrize(
    ("plan", "gib", "message"),
    [
        (
            case("Qwen/Qwen2.5-7B", world_size=8, kl_coef=0.001, max_tokens=8192),
            64,
            "Qwen/Qwen2.5-7B cannot fit: a rank of 8 needs about 86.8 GiB in phase update, but has 64.0 GiB "
            "(a test's), of which 1 are for libraries; largest: activations 55.3 GiB, parameters 14.2 GiB, "
            "optimizer 10.6 GiB, head 3.9 GiB\n"
            "  - model.gradient_checkpointing=true: 42.4 GiB at the peak\n"
            "  - batching.max_tokens=4096: 59.1 GiB at the peak",
        ),
        (  # the optimizer alone is too large for one device
            case("Qwen/Qwen2.5-3B", world_size=1, kv_cache_gib=4.0),
            48,
            "Qwen/Qwen2.5-3B cannot fit: a rank of 1 needs about 70.1 GiB in phase update, but has 48.0 GiB "
            "(a test's), of which 1 are for libraries; largest: optimizer 34.5 GiB, activations 20.5 GiB, "
            "parameters 5.7 GiB, gradients 5.7 GiB\n"
            "  - 4 ranks: 39.9 GiB at the peak\n"
            "  - model.lora.rank=32: 29.6 GiB at the peak",
        ),
        (  # the rollout is the larger part
            case("Qwen/Qwen2.5-7B", world_size=8, training=False),
            20,
            "Qwen/Qwen2.5-7B cannot fit: a rank of 8 needs about 23.6 GiB in phase rollout, but has 20.0 GiB "
            "(a test's), of which 1 are for libraries; largest: engine weights 14.2 GiB, key-value cache "
            "8.0 GiB, engine at work 1.4 GiB\n"
            "  - engine.kv_cache_gib=3.4: 19.0 GiB at the peak",
        ),
        (  # several settings together
            case("Qwen/Qwen2.5-7B", world_size=8, kl_coef=0.001),
            40,
            "Qwen/Qwen2.5-7B cannot fit: a rank of 8 needs about 59.1 GiB in phase update, but has 40.0 GiB "
            "(a test's), of which 1 are for libraries; largest: activations 27.7 GiB, parameters 14.2 GiB, "
            "optimizer 10.6 GiB, head 3.9 GiB\n"
            "  - model.gradient_checkpointing=true deepspeed.zero_stage=3: 30.9 GiB at the peak",
        ),
        (
            case("Qwen/Qwen2.5-7B", world_size=8),
            4,
            "Qwen/Qwen2.5-7B cannot fit: a rank of 8 needs about 59.1 GiB in phase update, but has 4.0 GiB "
            "(a test's), of which 1 are for libraries; largest: activations 27.7 GiB, parameters 14.2 GiB, "
            "optimizer 10.6 GiB, head 3.9 GiB\n"
            "  - nothing that this plan knows makes it fit: use larger devices, or a smaller model",
        ),
    ],
)
def test_refusals(plan: Case, gib: float, message: str) -> None:
    assert refusal(plan, available(gib)) == message


@pytest.mark.parametrize(
    ("host_gib", "message"),
    [
        (12.0, ""),
        (
            10.0,
            "a rank offloads 10.6 GiB (optimizer, reference) to main memory, of which 10.0 GiB a rank is "
            "free here; use more ranks, deepspeed.zero_stage=1 or more, or adapters (model.lora.rank=32)",
        ),
    ],
)
def test_what_is_offloaded_must_fit_into_main_memory(host_gib: float, message: str) -> None:
    assert refusal(case("Qwen/Qwen2.5-7B", world_size=8), available(80, host_gib)) == message


def test_an_estimate_alone_refuses_only_if_it_is_far_too_large() -> None:
    """The plan says 59.1 GiB, of which 31.6 are estimated: 51.2 are sure enough."""
    plan = case("Qwen/Qwen2.5-7B", world_size=8)
    total = plan.plan().total(Phase.update) / GIB
    trusted = plan.plan().total(Phase.update, estimates=0.75) / GIB
    assert trusted < total - 7
    assert refusal(plan, available(trusted + 1.01)) == ""
    assert "cannot fit" in refusal(plan, available(trusted + 0.99))


# --- the machine ----------------------------------------------------------------------------------------


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


MEMINFO = {"proc/meminfo": "MemTotal:  4096 kB\nMemFree:  1024 kB\nMemAvailable:  2048 kB\n"}
CACHE = "anon 5\ninactive_file 1000\nactive_file 500\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        (MEMINFO, 2048 * 1024),
        ({**MEMINFO, "proc/self/cgroup": "0::/\n"}, 2048 * 1024),  # no limit anywhere
        (  # version 2, the limit on a parent; its page cache can be given up
            {
                **MEMINFO,
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/memory.max": "100000\n",
                "sys/fs/cgroup/a/memory.current": "40000\n",
                "sys/fs/cgroup/a/memory.stat": CACHE,
                "sys/fs/cgroup/a/b/memory.max": "max\n",
            },
            100_000 - 40_000 + 1500,
        ),
        (  # a container sees its own group at the base
            {
                **MEMINFO,
                "proc/self/cgroup": "0::/of/the/host\n",
                "sys/fs/cgroup/memory.max": "50000\n",
                "sys/fs/cgroup/memory.current": "60000\n",
                "sys/fs/cgroup/memory.stat": CACHE,
            },
            0,
        ),
        (  # version 1
            {
                **MEMINFO,
                "proc/self/cgroup": "5:cpu:/x\n4:memory:/x\n0::/\n",
                "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "70000\n",
                "sys/fs/cgroup/memory/x/memory.usage_in_bytes": "20000\n",
                "sys/fs/cgroup/memory/x/memory.stat": "total_inactive_file 7\ninactive_file 5\n",
            },
            50_007,
        ),
        (  # version 1's way to say that there is none
            {
                **MEMINFO,
                "proc/self/cgroup": "4:memory:/x\n",
                "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/x/memory.usage_in_bytes": "20000\n",
                "sys/fs/cgroup/memory/x/memory.stat": "",
            },
            2048 * 1024,
        ),
    ],
)
def test_main_memory(files: dict[str, str], expected: int | None, tmp_path: Path) -> None:
    assert main_memory(write(tmp_path, files)) == expected


def test_ranks_on_a_cpu_share_its_memory(tmp_path: Path) -> None:
    found = rank_memory(Device.cpu, 4, root=write(tmp_path, MEMINFO))
    assert (found.device, found.host) == (512 * 1024, 512 * 1024)


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 81559; echo 40960", 40960 * 2**20),
        ('test "$3" = --id=1,3 && echo 24576', 24576 * 2**20),
        ("echo '[N/A]'", None),
        ("exit 9", None),
        (None, None),
    ],
)
def test_gpu_memory(
    script: str | None, expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers as nvidia-smi gives them, from a program of that name."""
    if script is not None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin" if script is not None else str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if script is not None and "--id" in script:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    assert gpu_memory() == expected


# --- the command line -----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_run_that_cannot_fit_ends_before_anything_loads(command: str, shipped_files: Path) -> None:
    program = (
        "import sys, atexit\n"
        "heavy = ('torch', 'transformers', 'vllm', 'deepspeed')\n"
        "atexit.register(lambda: print('loaded:', *(name for name in heavy if name in sys.modules)))\n"
        f"sys.argv = ['searchrl', '{command}', '+experiment=smoke', 'device_memory_gib=1']\n"
        "from searchrl.cli import run; run()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == "loaded:\n"
    assert done.stderr.startswith("searchrl: random:tiny cannot fit: a rank of 1 needs about 0.")
    assert "but has 1.0 GiB (device_memory_gib)" in done.stderr
    assert not (shipped_files / "runs").exists()


def test_validate_judges_by_the_stated_memory_alone(
    shipped_files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["validate", "+experiment=nq_hotpotqa_7b", "processes=8", "device_memory_gib=80"])
    assert capsys.readouterr().out.endswith("  fits 80 GiB\n")
    with pytest.raises(ConfigError, match=r"a rank of 8 needs about .* GiB in phase \w+, but has 24.0 GiB"):
        main(["validate", "+experiment=nq_hotpotqa_7b", "processes=8", "device_memory_gib=24"])


# --- beside what was measured ---------------------------------------------------------------------------


def test_the_plan_stands_beside_the_highest_growth() -> None:
    cfg = case("package:smollm2-135m", world_size=1, device=Device.cpu, kv_cache_gib=1.0).cfg
    plan = plan_memory(cfg, KNOWN_SHAPES[cfg.model.path], world_size=1)
    base = {"memory/baseline_gib": 0.5, "memory/rollout_peak_gib": 3.0, "memory/update_peak_gib": 4.0}
    records = [base, {**base, "memory/rollout_peak_gib": 3.25}, {"eval/nq/exact_match": 0.1}]
    update = max(plan.total(Phase.update), plan.total(Phase.step)) / GIB
    assert memory_rows(cfg, records, world_size=1) == [
        ("rollout", f"{plan.total(Phase.rollout) / GIB:.2f}", "2.75"),
        ("update", f"{update:.2f}", "3.50"),
    ]
    cfg.model.path = "/somewhere/unknown"
    assert memory_rows(cfg, records, world_size=1) == []
