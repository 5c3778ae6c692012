"""What this machine must have before a run's processes start: packages, and the hub's model.

`searchrl validate` does not ask for it: a configuration can be checked where it is not run.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from searchrl.config import Config, Device, IndexKind, RetrievalKind
from searchrl.errors import MissingPackageError
from searchrl.models import BUILDERS, ModelError

_HUB_TIMEOUT_S = 10.0


def require_packages(cfg: Config) -> None:
    """Find the packages that the run needs, without importing them.

    Raises:
        MissingPackageError: some are not installed; names all of them, and how to install them.
    """
    needed = {"torch": "the trainer", "deepspeed": "the trainer", "vllm": "the engine"}
    embeds = cfg.retrieval.kind is RetrievalKind.embedded
    if embeds and cfg.retrieval.index is not IndexKind.bm25:
        needed["faiss"] = f"retrieval.index={cfg.retrieval.index}"
    missing = [f"{name} (for {purpose})" for name, purpose in needed.items() if not _is_installed(name)]
    if missing:
        extra = "gpu" if cfg.device is Device.cuda else "cpu"
        raise MissingPackageError(
            f"not installed: {', '.join(missing)}; they come with searchrl's extra {extra!r}: "
            f"`make setup EXTRA={extra}` installs what was tested"
        )


def require_model(cfg: Config) -> None:
    """Fetch the ``config.json`` of a model of the hub, a few kilobytes, if it is not here yet.

    So a wrong name is known at once, and the plan of memory can be made.

    Raises:
        ModelError: the hub has no such model, does not give it, or does not answer.
    """
    name = cfg.checkpoint or cfg.model.path
    if name in BUILDERS or Path(name).expanduser().is_dir():
        return
    import httpx2  # what huggingface_hub asks with
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    setting = "checkpoint" if cfg.checkpoint else "model.path"
    try:
        # Asks once; a download tries again for half a minute.
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=_HUB_TIMEOUT_S)
        hf_hub_download(name, "config.json")
    except GatedRepoError as error:
        raise ModelError(
            f"{setting}={name}: the hub gives it only to who has accepted its terms; accept them on its "
            "page, and set HF_TOKEN to a token of that account"
        ) from error
    except (RepositoryNotFoundError, EntryNotFoundError) as error:
        raise ModelError(
            f"{setting}={name} is no folder here and no model of the hub; correct it, or set HF_TOKEN if it "
            "is private"
        ) from error
    except (OSError, httpx2.HTTPError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"{setting}={name} is no folder here, and the hub cannot be asked ({reason}); correct the path, "
            f"or fetch the model where there is a network, with `hf download {name}`"
        ) from error


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ImportError:  # something on the way refuses it
        return False
