"""All checks, the quick ones first; those that load something in processes of their own."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from searchrl.config import Config, ConfigError
from searchrl.doctor.findings import Finding, Status, failed, ok
from searchrl.doctor.machine import disk, environment, memory, packages, versions
from searchrl.launcher import world_size
from searchrl.validation import validate

QUICK = (versions, packages, environment, memory, disk)

HINTS = {
    "gpus": "`nvidia-smi` and `python -c 'import torch; torch.cuda.init()'` should work first",
    "communication": "see NCCL_DEBUG=INFO; NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME name the network to use",
    "retriever": "docs/retrieval.md has the sources, and what their errors mean",
    "model": "model.path is a checkpoint's folder, or a hub name, which needs the hub or a cache (HF_HOME)",
    "probe": "engine and trainer do not work together here: compare `searchrl doctor` on another machine",
}
"""What to do when a check itself breaks down, by check."""

TIMEOUT_S = 900.0
"""Of one check: models and indexes may have to be fetched or built."""

_SOURCE = str(Path(__file__).resolve().parents[2])
_TAIL = 1500


def diagnose(cfg: Config, *, deep: bool = False) -> Iterator[Finding]:
    """Check the machine and what a run of ``cfg`` needs, one finding after another.

    Args:
        cfg: composed, but not validated: that is the first check.
        deep: probe with the run's own model, not with a tiny one.
    """
    ranks = world_size(cfg)
    yield _configuration(cfg, ranks)
    for check in QUICK:
        yield from check(cfg, ranks)
    for name in HINTS:
        yield from run_part("deep_probe" if deep and name == "probe" else name, cfg)


def _configuration(cfg: Config, ranks: int) -> Finding:
    try:
        validate(cfg, world_size=ranks, training=not cfg.checkpoint)
    except ConfigError as error:
        return failed("configuration", str(error))
    return ok("configuration", f"{cfg.name}: valid for {ranks} rank(s) with device={cfg.device}")


def run_part(name: str, cfg: Config, *, timeout_s: float = TIMEOUT_S) -> Iterator[Finding]:
    """Findings of one of ``parts.PARTS``, from a process of its own; its death is one too."""
    check = name.removeprefix("deep_")
    with tempfile.TemporaryDirectory(prefix="searchrl-") as folder:
        file = Path(folder) / "config"
        file.write_bytes(pickle.dumps(cfg))
        command = [sys.executable, "-m", "searchrl.doctor.parts", name, str(file)]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([_SOURCE, os.environ.get("PYTHONPATH", "")]),
        }
        pipe = subprocess.PIPE
        with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
            try:
                printed, errors = process.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()  # its ranks and its search server end with it
                yield failed(check, f"no answer within {timeout_s:g} s", HINTS[check])
                return
    found = [json.loads(line) for line in printed.splitlines() if line.startswith('{"check"')]
    for entry in found:
        yield Finding(**{**entry, "status": Status(entry["status"])})
    if process.returncode:
        code = process.returncode
        how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
        yield failed(check, f"the check broke down ({how}):\n{errors.strip()[-_TAIL:]}", HINTS[check])
