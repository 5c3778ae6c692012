"""What is not loaded, because loading it would run somebody else's code."""

from __future__ import annotations

import json
from pathlib import Path

from searchrl.errors import InputError

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class UntrustedError(InputError, RuntimeError):
    """A model that would run code of its own; the message names the file and the remedy."""


def trusted(folder: Path) -> Path:
    """Return the checkpoint's folder, unless its weights are pickles or it brings its architecture as code.

    Raises:
        UntrustedError: loading it would run its code.
    """
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickled and not any(folder.glob("*.safetensors")):
        raise UntrustedError(
            f"{folder} has its weights as a pickle only ({pickled[0]}), which can run code when loaded; "
            "where you trust it, write safetensors: AutoModelForCausalLM.from_pretrained(FOLDER, "
            "use_safetensors=False).save_pretrained(OTHER)"
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UntrustedError(f"{folder / 'config.json'} is no JSON ({error}); copy it again") from error
    if isinstance(config, dict) and "auto_map" in config:
        from transformers import CONFIG_MAPPING

        kind = config.get("model_type")
        if kind not in CONFIG_MAPPING:
            raise UntrustedError(
                f"{folder} brings Python code of its own (auto_map in config.json), which is never run, and "
                f"transformers does not know its model_type={kind!r}; use another model, or a transformers "
                "that knows it"
            )
    return folder
