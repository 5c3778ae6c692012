"""What tests know of ``examples/`` and ``conf/``."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
SOURCE = (ROOT / "examples" / "custom.py").read_text(encoding="utf-8")


def custom_overrides() -> list[str]:
    """The overrides of the command in the example's docstring; experiment and name come first."""
    command = re.search(r"searchrl train (.*?)\n\n", SOURCE, re.DOTALL)
    assert command is not None
    return shlex.split(command[1].replace("\\\n", " "))


def touch_shipped_files(folder: Path) -> None:
    """Files where the shipped configurations look for data, seen from ``folder``: a question, no more."""
    question = '{"id": "1", "question": "q?", "golden_answers": ["a"], "data_source": "d"}\n'
    for path in {*CONF.glob("data/*.yaml"), *CONF.glob("retrieval/*.yaml")}:
        around = {"assets": "assets", "run_dir": "runs"}
        shipped = OmegaConf.to_container(OmegaConf.merge(around, OmegaConf.load(path)), resolve=True)
        assert isinstance(shipped, dict)
        for key in ("train", "eval", "corpus"):
            if key in shipped:
                file = folder / shipped[key]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(question, encoding="utf-8")
        if "index_path" in shipped:
            (folder / shipped["index_path"]).mkdir(parents=True)
            (folder / shipped["index_path"] / "manifest.json").touch()


def touch_models(overrides: Sequence[str], folder: Path) -> None:
    """Where ``overrides`` name a model of a run, seen from ``folder``, files that look like one."""
    for override in overrides:
        setting, _, value = override.partition("=")
        if setting in ("checkpoint", "model.path") and value.startswith("runs/"):
            (folder / value).mkdir(parents=True, exist_ok=True)
            (folder / value / "config.json").write_text("{}", encoding="utf-8")
            for name in ("model.safetensors", "tokenizer.json"):
                (folder / value / name).touch()
