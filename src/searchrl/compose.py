"""From overrides to a checked configuration; what cannot be composed is explained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searchrl.errors import did_you_mean

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

    ConfigStore.instance().store(name="schema", node=Config)
    try:
        with initialize_config_dir(str(config_folder()), version_base=None):
            composed = compose("train", overrides=list(overrides))
        cfg = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException, AttributeError) as error:
        raise ConfigError(_explain(error, overrides)) from error
    assert isinstance(cfg, Config)
    resolved = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(resolved, dict)
    return cfg, {str(key): value for key, value in resolved.items()}


def config_folder() -> Path:
    """Folder of the YAML files: inside the installed package, or beside ``src`` in a checkout."""
    packaged = Path(str(files("searchrl"))) / "conf"
    return packaged if packaged.is_dir() else Path(__file__).resolve().parents[2] / "conf"


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    """What names nothing that exists, with the nearest that does; else Hydra's message with its cause."""
    from hydra.errors import OverrideParseException

    from searchrl.config.reference import group_options, known_keys

    keys, options = known_keys(), group_options(config_folder())
    if unknown := [line for one in overrides for line in _unknown(one, keys, options)]:
        return "\n".join(unknown)
    if isinstance(error, OverrideParseException):
        key, why = error.override.partition("=")[0], str(error).partition("\n")[0]
        return (
            f"the value of {key} cannot be read ({why}); one with brackets, braces, quotes or a colon is "
            f"quoted twice, for the shell and for Hydra: '{key}=\"…\"'"
        )
    lines = [str(error).strip()]
    cause = error.__cause__
    while cause is not None:
        text = str(cause).strip().partition("\n")[0]
        if text not in lines[0]:
            lines.append(text)
        cause = cause.__cause__
    return "\n".join(lines)


def _unknown(override: str, keys: Sequence[str], options: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """Messages about an override whose key, or whose option of a group, does not exist."""
    written, equals, value = override.partition("=")
    key = written.lstrip("+~")
    if key.rpartition(".")[0].endswith(".kwargs") or key.startswith("hydra"):
        return  # a custom function's own arguments; Hydra's own settings
    if not equals and not written.startswith("~"):
        name = key if key in options["experiment"] else "NAME"
        yield f"{override!r} sets nothing; settings are written key=value, experiments +experiment={name}"
    elif written == "experiment":
        yield f"an experiment is added to the settings, with a plus: +{override}"
    elif written.startswith("+") and key in options and key != "experiment":
        yield f"{key} is chosen without a plus: {override.lstrip('+')}"
    elif key not in keys and key not in options:
        yield f"unknown key {key!r}{did_you_mean(key, [*keys, *options])}"
    elif key in options and not value.startswith("{"):
        known = options[key]
        for name in (part.strip(" '\"") for part in value.strip("[]").split(",")):
            if name not in known and name not in ("", "null"):
                yield f"there is no {key}={name}{did_you_mean(name, known)} (there are: {', '.join(known)})"
