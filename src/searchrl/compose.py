"""From overrides to a checked configuration; what cannot be composed is explained."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from searchrl.config import Config


def load_config(overrides: Sequence[str], *, training: bool = True) -> tuple[Config, dict[str, Any]]:
    """Compose, convert and check a configuration.

    Args:
        overrides: as on the command line.
        training: what it must be good for; False: an evaluation.

    Returns:
        The typed configuration, and the same as plain containers for the logs.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or a value that cannot work.
    """
    from searchrl.launcher import local_ranks, world_size
    from searchrl.validation import validate

    cfg, resolved = compose_config(overrides)
    validate(cfg, world_size=world_size(cfg), local_world_size=local_ranks(cfg), training=training)
    return cfg, resolved


def compose_config(overrides: Sequence[str]) -> tuple[Config, dict[str, Any]]:
    """`load_config` without the checks of values.

    Raises:
        ConfigError: an unknown key, or a value of the wrong type.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from searchrl.config import Config, ConfigError
    from searchrl.config.reference import known_keys
    from searchrl.explain import explain

    ConfigStore.instance().store(name="schema", node=Config)
    try:
        with initialize_config_dir(str(config_folder()), version_base=None):
            composed = compose("train", overrides=list(overrides))
        cfg = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException, AttributeError) as error:
        raise ConfigError(explain(error, overrides, known_keys())) from error
    assert isinstance(cfg, Config)
    resolved = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(resolved, dict)
    return cfg, {str(key): value for key, value in resolved.items()}


def config_folder() -> Path:
    """Folder of the YAML files: inside the installed package, or beside ``src`` in a checkout."""
    packaged = Path(str(files("searchrl"))) / "conf"
    return packaged if packaged.is_dir() else Path(__file__).resolve().parents[2] / "conf"
