"""What a checkpoint belongs to. Another model, other data or settings make another run, which is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from searchrl.config import Config, ConfigError, settings_to_keep

_SAMPLES, _SAMPLE_BYTES = 64, 2**16


def identity_of(cfg: Config, *, model: Path | str, questions: str, retrieval: str) -> dict[str, Any]:
    """By name everything that decides what a run learns, as JSON values.

    Args:
        cfg: the run's.
        model: folder or hub name of the model, before its warm start, which settings describe.
        questions: fingerprint of the training questions.
        retrieval: names what decides search results.
    """
    contents = {"model": model_identity(model), "retrieval": retrieval, "questions": questions}
    return settings_to_keep(cfg) | contents


def model_identity(model: Path | str) -> str:
    """A hub name itself; of a folder, which may move, a hash over its files' sizes and samples of them.

    Samples, because hashing all of a large model would keep every start waiting; other weights differ in
    nearly every one of them.
    """
    if not isinstance(model, Path):
        return model
    digest = hashlib.sha256()
    for path in sorted([*model.glob("*.json"), *model.glob("*.safetensors"), *model.glob("*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for offset in range(0, size, max(_SAMPLE_BYTES, size // _SAMPLES)):
                file.seek(offset)
                digest.update(file.read(_SAMPLE_BYTES))
    return f"files {digest.hexdigest()[:16]}"


def refuse_differences(
    folder: Path, saved: Mapping[str, Any], now: Mapping[str, Any], changes: Collection[str]
) -> None:
    """Raise ``ConfigError`` if entries of ``now``, but for ``changes``, were others in ``saved``."""
    differing = [name for name in now if name not in changes and saved.get(name) != now[name]]
    if differing:
        lines = "\n".join(
            f"  - {name}: {_shown(saved.get(name))} there, {_shown(now[name])} here" for name in differing
        )
        raise ConfigError(
            f"{folder} belongs to another run:\n{lines}\n"
            f"set them back, choose another name=…, or mean it: resume_changes=[{','.join(differing)}]"
        )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:40]}…{text[-16:]}"
