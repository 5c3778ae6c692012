"""A machine that is ready passes every check; whatever is not fails one, which says what to do."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from searchrl.config import (
    Config,
    Device,
    DType,
    EngineConfig,
    IndexKind,
    ModelConfig,
    RetrievalConfig,
    RetrievalKind,
    SavingConfig,
)
from searchrl.doctor.diagnosis import run_part
from searchrl.doctor.findings import Finding, Status, failed
from searchrl.doctor.machine import disk, environment, memory, packages, versions
from searchrl.sources import retrieval_index


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    """A tiny model and three passages."""
    corpus = tmp_path / "towns" / "corpus.jsonl"
    corpus.parent.mkdir()
    rows = [{"id": name, "contents": f'"{name}"\n{name} is a capital.'} for name in ("Accra", "Lima", "Oslo")]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Config(
        device=Device.cpu,
        run_dir=str(tmp_path / "run"),
        assets=str(tmp_path / "assets"),
        model=ModelConfig(path="random:tiny", dtype=DType.float32),
        retrieval=RetrievalConfig(corpus=str(corpus), index=IndexKind.bm25),
    )


def says(finding: Finding, status: Status, *parts: str) -> None:
    """The finding has this status and says all of this, the remedy included."""
    assert (finding.status, [part for part in parts if part not in str(finding)]) == (status, [])


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages' metadata that comes before the real ones."""
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return folder


def package(folder: Path, name: str, version: str, *requires: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {one}" for one in requires), ""]))


def test_a_wrong_version_and_a_missing_package_fail(cfg: Config, pretend: Path) -> None:
    wanted = (
        "torch==2.13.0; extra == 'cpu'",
        "httpx>=0.28",
        "absent-package>=1",
        "faiss-gpu; extra == 'gpu'",
    )
    package(pretend, "searchrl", "0.1.0", *wanted)
    (absent,) = versions(cfg, 1)
    says(
        absent,
        Status.FAILED,
        "absent-package is not installed; searchrl needs absent-package>=1",
        "make setup",
    )
    package(pretend, "torch", "2.12.1+cpu")
    package(pretend, "absent-package", "1.0rc1+local")
    (wrong, early) = versions(cfg, 1)
    says(wrong, Status.FAILED, "torch is installed as 2.12.1+cpu; searchrl needs torch==2.13.0", "make setup")
    says(early, Status.FAILED, "absent-package is installed as 1.0rc1+local")
    cfg.device = Device.cuda
    assert "faiss-gpu is not installed" in [*versions(cfg, 1)][-1].text
    assert all("EXTRA=gpu" in finding.remedy for finding in versions(cfg, 1))


def test_what_is_installed_meets_the_pins(cfg: Config) -> None:
    (found,) = versions(cfg, 1)
    says(found, Status.OK, "torch 2.", "requirements are met")


def test_packages_that_break_others_fail(cfg: Config, pretend: Path) -> None:
    (quiet,) = packages(cfg, 1)
    says(quiet, Status.OK)
    package(pretend, "faiss-gpu", "1.15.1")
    package(pretend, "torchvision", "0.28.0")
    package(pretend, "torchaudio", "2.11.0+cpu")
    rivals, cuda_build = packages(cfg, 1)
    says(
        rivals,
        Status.FAILED,
        "faiss-cpu and faiss-gpu",
        "pip uninstall faiss-gpu faiss-cpu, then install faiss-cpu",
    )
    says(cuda_build, Status.FAILED, "torchvision 0.28.0 is a CUDA build", "pip uninstall torchvision")


CORES = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("name", "value", "status", "text"),
    [
        ("VLLM_ENABLE_V1_MULTIPROCESSING", "1", Status.FAILED, "into another process"),
        ("DS_ACCELERATOR", "cuda", Status.FAILED, "does not go with device=cpu"),
        ("VLLM_CPU_KVCACHE_SPACE", "4", Status.WARNING, "takes the place of engine.kv_cache_gib=1"),
        ("OMP_NUM_THREADS", str(CORES), Status.WARNING, "gives 2 rank(s) more threads than"),
        ("OMP_WAIT_POLICY", "ACTIVE", Status.WARNING, "lets waiting threads spin"),
    ],
)
def test_variables_in_the_way(
    cfg: Config, monkeypatch: pytest.MonkeyPatch, name: str, value: str, status: Status, text: str
) -> None:
    for variable in ("OMP_NUM_THREADS", "DS_ACCELERATOR"):
        monkeypatch.delenv(variable, raising=False)
    (quiet,) = environment(cfg, 2)
    says(quiet, Status.OK)
    monkeypatch.setenv(name, value)
    (found,) = environment(cfg, 2)
    says(found, status, f"{name}={value}", text, f"unset {name}")


def test_memory_and_disk_are_compared_with_what_the_run_needs(cfg: Config, tmp_path: Path) -> None:
    (enough,) = memory(cfg, 1)
    says(enough, Status.OK, "1 rank(s) need about 1.", "GiB each, in phase ")
    cfg.engine = EngineConfig(kv_cache_gib=1e6)
    (short,) = memory(cfg, 2)
    says(short, Status.FAILED, "a rank of 2 needs about 100000", "engine.kv_cache_gib=")
    assert [finding.status for finding in disk(cfg, 1)] == [Status.OK, Status.OK]
    cfg.saving = SavingConfig(keep=10**9)
    full, assets = disk(cfg, 1)
    says(
        full,
        Status.FAILED,
        f"free for run_dir={tmp_path / 'run'}",
        "1000000001 checkpoints",
        "lower saving.keep",
    )
    says(assets, Status.OK)


def test_a_finding_is_printed_with_its_remedy_on_a_line_of_its_own() -> None:
    margin = "\n" + 24 * " "
    assert (
        str(failed("disk", "one\ntwo", "three")) == f"failed   disk           one{margin}two{margin}-> three"
    )


# --- checks in processes of their own -------------------------------------------------------------------


@pytest.mark.integration
def test_a_source_without_answer_or_index_fails(cfg: Config, tmp_path: Path) -> None:
    (unbuilt,) = run_part("retriever", cfg)
    says(
        unbuilt,
        Status.WARNING,
        f"{tmp_path}/assets/indexes/towns-bm25 is not built yet",
        "searchrl index build",
    )
    index = retrieval_index(cfg).rename(tmp_path / "mine")
    cfg.retrieval.index_path = str(index)
    (index / "bm25" / "vocab.index.json").write_text("{")
    (damaged,) = run_part("retriever", cfg)
    says(damaged, Status.FAILED, "vocab.index.json")
    (index / "manifest.json").unlink()
    (missing,) = run_part("retriever", cfg)
    says(missing, Status.FAILED, f"{index} holds no index", "searchrl index build")
    cfg.retrieval = RetrievalConfig(kind=RetrievalKind.http, urls=("http://127.0.0.1:9",), deadline_s=0.3)
    (dead,) = run_part("retriever", cfg)
    says(dead, Status.FAILED, "http://127.0.0.1:9/health cannot be reached")


@pytest.mark.integration
def test_a_damaged_model_fails(cfg: Config, tiny_model: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(tiny_model, tmp_path / "model")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    cfg.model.path = str(damaged)
    tokenizer, found = run_part("model", cfg)
    says(tokenizer, Status.OK, "makes a prompt of")
    says(found, Status.FAILED, f"{weights} is no whole file of weights", "again")
    (damaged / "config.json").unlink()
    (nothing,) = run_part("model", cfg)
    says(nothing, Status.FAILED, "has no config.json")


@pytest.mark.integration
def test_gpus_that_are_not_there_fail(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    cfg.device = Device.cuda
    (found,) = run_part("gpus", cfg)
    says(
        found,
        Status.FAILED,
        "1 in all, but the NVIDIA driver shows 0 within CUDA_VISIBLE_DEVICES=",
        "device=cpu",
    )


@pytest.mark.integration
@pytest.mark.parametrize(
    ("code", "timeout_s", "text"),
    [("os.abort()", 60, "broke down (SIGABRT)"), ("time.sleep(600)", 1, "no answer within 1 s")],
)
def test_a_check_that_dies_or_hangs_has_failed(
    cfg: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, timeout_s: float, text: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import os, time; {code}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (found,) = run_part("communication", cfg, timeout_s=timeout_s)
    says(found, Status.FAILED, text, "GLOO_SOCKET_IFNAME")
