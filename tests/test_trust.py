"""Nothing is loaded that could run code: models, checkpoints, arrays, indexes."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from searchrl.compose import compose_config
from searchrl.config import ConfigError, DType, ModelConfig
from searchrl.models import resolve_model
from searchrl.policy import load_model
from searchrl.retrieval.corpus import Corpus
from searchrl.trust import UntrustedError


class Loud:
    """Raises when it is unpickled: proof that what holds it was."""

    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('code of a pickle has run')",)


def test_the_proof_works() -> None:
    with pytest.raises(SystemExit):
        pickle.loads(pickle.dumps(Loud()))


def copied(model: Path, to: Path) -> Path:
    shutil.copytree(model, to)
    return to


def test_pickled_weights_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = copied(tiny_model, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Loud()}, folder / "pytorch_model.bin")
    with pytest.raises(UntrustedError, match=r"pickle only \(pytorch_model.bin\).*save_pretrained"):
        resolve_model(str(folder), tmp_path)
    with pytest.raises(OSError, match="safetensors"):  # what a hub name would end in
        load_model(folder, ModelConfig(dtype=DType.float32))
    shutil.copy(tiny_model / "model.safetensors", folder)  # beside them nobody reads the pickles
    assert resolve_model(str(folder), tmp_path) == folder
    load_model(folder, ModelConfig(dtype=DType.float32))


def test_code_beside_a_model_is_not_run(tiny_model: Path, tmp_path: Path) -> None:
    folder = copied(tiny_model, tmp_path / "model")
    (folder / "evil.py").write_text("raise SystemExit('code of a model has run')\n", encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    load_model(resolve_model(str(folder), tmp_path), ModelConfig(dtype=DType.float32))  # a type that is known
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "evil"}), encoding="utf-8")
    with pytest.raises(
        UntrustedError, match=r"never run, and transformers does not know its model_type='evil'"
    ):
        resolve_model(str(folder), tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(folder, ModelConfig(dtype=DType.float32))


@pytest.mark.parametrize("content", ["", "{", "\x00"])
def test_a_broken_configuration_says_so(content: str, tiny_model: Path, tmp_path: Path) -> None:
    folder = copied(tiny_model, tmp_path / "model")
    (folder / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(UntrustedError, match="is no JSON"):
        resolve_model(str(folder), tmp_path)


@pytest.mark.parametrize("key", ["model.trust_remote_code", "trust_remote_code", "engine.trust_remote_code"])
def test_no_configuration_allows_it(key: str) -> None:
    for prefix in ("", "+"):
        with pytest.raises(ConfigError, match="trust_remote_code"):
            compose_config(["+experiment=smoke", f"{prefix}{key}=true"])


def test_a_corpus_offset_file_that_is_a_pickle_is_refused(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"id": "0", "contents": "\\"T\\"\\nx"}\n', encoding="utf-8")
    Corpus(corpus).close()
    objects = np.empty(1, dtype=object)
    objects[0] = Loud()
    np.save(tmp_path / "corpus.jsonl.offsets.npy", objects, allow_pickle=True)
    Corpus(corpus).close()  # scanned again instead
    assert np.load(tmp_path / "corpus.jsonl.offsets.npy").dtype == np.uint64
