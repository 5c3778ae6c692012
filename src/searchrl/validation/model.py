"""Checks of the model that a run starts from: is it there, is it whole, can it read episodes so long."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from searchrl.config import Config
from searchrl.model_shape import context_limit
from searchrl.models import BUILDERS, ModelError, resolve_model
from searchrl.trust import UntrustedError

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
"""Files of which a folder has one at least, if transformers can make a tokenizer from it."""


def model_problems(cfg: Config) -> Iterator[str]:
    """The first problem of ``checkpoint``, or of ``model.path`` where there is none, a sentence."""
    setting = "checkpoint" if cfg.checkpoint else "model.path"
    name = cfg.checkpoint or cfg.model.path
    if not name.strip():
        return  # that it is missing is said elsewhere
    if name not in BUILDERS:
        try:
            folder = resolve_model(name, Path(cfg.assets))
        except (ModelError, UntrustedError) as error:
            yield f"{setting}={name}: {error}{_below(Path(name))}"
            return
        if isinstance(folder, Path) and (missing := _missing(folder)):
            yield f"{setting}={name} has no {missing}; copy it whole, or write it again with save_pretrained"
            return
    limit, asked = context_limit(name), cfg.episode.max_context_tokens
    if limit is not None and asked > limit:
        yield (
            f"episode.max_context_tokens={asked} is more than the {limit} tokens that {name} can read; lower "
            "it, or choose another model"
        )


def _missing(folder: Path) -> str:
    """What a checkpoint's folder lacks, empty if nothing."""
    if not any(folder.glob("*.safetensors")):
        return "weights (*.safetensors)"
    return "" if any((folder / name).exists() for name in _TOKENIZERS) else "tokenizer (tokenizer.json)"


def _below(folder: Path) -> str:
    """What was probably meant: a run directory was named in place of the model in it."""
    model = folder / "model"
    return f"; did you mean {model}?" if (model / "config.json").is_file() else ""
