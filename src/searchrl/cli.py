"""Command line: ``searchrl <command> [Hydra overrides]``. Heavy imports happen behind the commands."""

from __future__ import annotations

import argparse
import difflib
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from searchrl.config import Config

_DESCRIPTION = """\
Teach a language model to search while it reasons.

  searchrl data worldfacts                     build the quickstart's corpus and questions
  searchrl train +experiment=quickstart        warm start, GRPO, evaluation before and after
  searchrl eval  +experiment=quickstart name=OTHER checkpoint=runs/NAME/model
  searchrl train +experiment=quickstart steps=5 group_size=4 optimizer.lr=1e-5
  searchrl doctor +experiment=quickstart       check the machine and all that this run needs

train, eval and warmstart start one process for each visible GPU; processes=N says otherwise.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script. Exit codes: docs/operations.md."""
    parser = argparse.ArgumentParser(
        prog="searchrl", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (help_text, function) in _HYDRA_COMMANDS.items():
        command = commands.add_parser(name, help=help_text)
        command.add_argument("overrides", nargs="*", help="Hydra overrides, for example steps=10")
        if function is _doctor:
            command.add_argument("--deep", action="store_true", help="probe with the run's own model")
        command.set_defaults(function=function)
    for name, help_text, function in _FLAG_COMMANDS:
        command = commands.add_parser(name, help=help_text, add_help=False)
        command.set_defaults(function=function)
    args, rest = parser.parse_known_args(argv)
    if rest and args.function not in (_data, _serve, _index, _replay, _report):
        parser.error(f"unrecognized arguments: {' '.join(rest)}; settings are written key=value")
    args.rest = rest
    args.function(args)


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
        raise ConfigError(_explain(error, overrides, Config)) from error
    assert isinstance(cfg, Config)
    resolved = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(resolved, dict)
    return cfg, {str(key): value for key, value in resolved.items()}


def config_folder() -> Path:
    """Folder of the YAML files: inside the installed package, or beside ``src`` in a checkout."""
    packaged = Path(str(files("searchrl"))) / "conf"
    return packaged if packaged.is_dir() else Path(__file__).resolve().parents[2] / "conf"


def _explain(error: Exception, overrides: Sequence[str], schema: type) -> str:
    """Hydra's message with its cause, and the nearest known key for an unknown one."""
    lines = [str(error).strip()]
    cause = error.__cause__
    while cause is not None:
        text = str(cause).strip().partition("\n")[0]
        if text not in lines[0]:
            lines.append(text)
        cause = cause.__cause__
    known = _keys(schema)
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        free = key.rpartition(".")[0].endswith(".kwargs")  # a custom function's own arguments
        if key not in known and not free and not key.startswith("experiment"):
            near = difflib.get_close_matches(key, known, n=1)
            lines.append(f"unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return "\n".join(lines)


def _keys(schema: Any, prefix: str = "") -> list[str]:
    """All dotted keys of the schema, config groups included."""
    keys = []
    for entry in fields(schema):
        keys.append(prefix + entry.name)
        if callable(entry.default_factory) and is_dataclass(nested := entry.default_factory()):
            keys += _keys(nested, f"{prefix}{entry.name}.")
    return keys


def _train(args: argparse.Namespace) -> None:
    from searchrl.launcher import world_size
    from searchrl.plan import summary

    cfg, resolved = load_config(args.overrides)
    _check_memory(cfg)
    _claim_run_dir(cfg, resolved)
    if _launched(args, cfg):
        return
    if os.environ.get("RANK", "0") == "0":
        print(summary(cfg, world_size=world_size(cfg)), flush=True)
    _prepare(cfg)
    from searchrl.trainer import train

    train(cfg, resolved)


def _eval(args: argparse.Namespace) -> None:
    cfg, resolved = load_config(args.overrides, training=False)
    _check_memory(cfg, training=False)
    _claim_run_dir(cfg, resolved, training=False)
    if _launched(args, cfg):
        return
    _prepare(cfg)
    from searchrl.evaluation.benchmark import evaluate_checkpoint

    evaluate_checkpoint(cfg, command=shlex.join(["searchrl", "eval", *args.overrides]))


def _launched(args: argparse.Namespace, cfg: Config) -> bool:
    """Give the command to several ranks on this machine, if it is to run in so many; True once they ended."""
    from searchrl.launcher import is_rank, launch, require_devices, world_size

    require_devices(cfg)
    if is_rank() or world_size(cfg) == 1:
        return False
    launch(["-m", "searchrl.cli", args.command, *args.overrides], world_size(cfg))
    return True


def _validate(args: argparse.Namespace) -> None:
    from searchrl.launcher import world_size
    from searchrl.plan import describe

    cfg, _ = load_config(args.overrides)
    print(
        f"valid: {cfg.steps} steps of {cfg.groups_per_step} groups x {cfg.group_size} = "
        f"{cfg.groups_per_step * cfg.group_size} trajectories, "
        f"{cfg.steps * cfg.groups_per_step * cfg.group_size} in all; run directory {cfg.run_dir}"
    )
    print(describe(cfg, world_size=world_size(cfg)))
    if cfg.device_memory_gib:
        _check_memory(cfg)
        print(f"  fits {cfg.device_memory_gib:g} GiB")


def _warmstart(args: argparse.Namespace) -> None:
    cfg, _ = load_config(args.overrides)
    if _launched(args, cfg):
        return
    _prepare(cfg)
    from searchrl.setup import initial_policy, open_environment

    with open_environment(cfg) as env:
        env.console.say(f"initial policy: {initial_policy(env)}")


def _doctor(args: argparse.Namespace) -> None:
    from searchrl.doctor.diagnosis import diagnose
    from searchrl.doctor.findings import Status
    from searchrl.launcher import visible_gpus

    overrides = args.overrides
    if not overrides:
        overrides = ["+experiment=smoke", *(["device=cuda"] if visible_gpus() else [])]
        print(f"no experiment is named: checking what {' '.join(overrides)} needs", flush=True)
    counts = dict.fromkeys(Status, 0)
    for finding in diagnose(compose_config(overrides)[0], deep=args.deep):
        counts[finding.status] += 1
        print(finding, flush=True)
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    if counts[Status.FAILED]:
        raise SystemExit(1)


def _data(args: argparse.Namespace) -> None:
    from searchrl.data.data_cli import main as data

    data(args.rest)


def _index(args: argparse.Namespace) -> None:
    from searchrl.models import resolve_model
    from searchrl.retrieval.index_cli import main as index

    index(args.rest, resolve_encoder=lambda name: Path(resolve_model(name, Path("assets"))))


def _serve(args: argparse.Namespace) -> None:
    from searchrl.retrieval.server import main as serve

    serve(args.rest)


def _replay(args: argparse.Namespace) -> None:
    parser = argparse.ArgumentParser(prog="searchrl replay")
    parser.add_argument("path", type=Path, help="folder of the dump, runs/NAME/dumps/step-N.rankR")
    parser.add_argument("--model", help="other weights than those that were saved with it")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    given = parser.parse_args(args.rest)
    from searchrl.environment import prepare_environment

    prepare_environment(given.device)
    from searchrl.replay import replay

    replay(given.path, model=given.model, device=given.device)


def _report(args: argparse.Namespace) -> None:
    from searchrl.report.command import main as report

    report(args.rest)


def _check_memory(cfg: Config, *, training: bool = True) -> None:
    """Refuse a run whose plan cannot fit; one rank of a machine speaks for all."""
    from searchrl.launcher import local_ranks, world_size
    from searchrl.plan import check_fits

    if os.environ.get("LOCAL_RANK", "0") == "0":
        check_fits(cfg, world_size=world_size(cfg), local_ranks=local_ranks(cfg), training=training)


def _claim_run_dir(cfg: Config, resolved: dict[str, Any], *, training: bool = True) -> None:
    """Create the run directory and record the configuration; never write over another run or evaluation."""
    from omegaconf import OmegaConf

    from searchrl.checkpoint import check_settings
    from searchrl.config import ConfigError

    if os.environ.get("RANK", "0") != "0":
        return
    run_dir = Path(cfg.run_dir)
    trained, evaluated = (run_dir / "metrics.jsonl").exists(), (run_dir / "eval" / "settings.json").exists()
    if cfg.resume and (evaluated if training else trained):
        other = "an evaluation" if training else "a training run"
        raise ConfigError(f"{run_dir} holds {other}, which cannot be continued so; choose another name=...")
    if (trained or evaluated) and not cfg.resume:
        raise ConfigError(
            f"{run_dir} holds a run already; continue it with resume=true, or choose another name=..."
        )
    if cfg.resume and training:
        check_settings(cfg)
    run_dir.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(resolved), run_dir / "config.yaml")


def _prepare(cfg: Config) -> None:
    from searchrl.environment import prepare_environment

    prepare_environment(str(cfg.device))


_HYDRA_COMMANDS: dict[str, tuple[str, Callable[[argparse.Namespace], None]]] = {
    "train": ("warm start if configured, GRPO, evaluation before and after", _train),
    "eval": ("answer data.eval with checkpoint=FOLDER (or model.path); the benchmark table", _eval),
    "warmstart": ("make the warm-started model that train would start from", _warmstart),
    "validate": (
        "check a configuration and print its plan: memory, tokens, steps; nothing is loaded",
        _validate,
    ),
    "doctor": ("check the machine and what a run needs; what failed says what to do", _doctor),
}


_FLAG_COMMANDS = (  # they take flags of their own, not Hydra's overrides
    ("data", "build, prepare and audit question sets", _data),
    ("index", "build, import, convert and compare retrieval indexes", _index),
    ("serve", "serve an index over HTTP", _serve),
    ("report", "a run as one page: curves, tables and every trajectory; --compare, --watch", _report),
    ("replay", "run a micro-batch again that was stopped because something is not finite", _replay),
)


def run() -> None:
    """``main`` with errors that explain themselves reported as one message instead of a traceback."""
    from searchrl.errors import SearchrlError
    from searchrl.launcher import join_launcher, tell_launcher

    join_launcher()
    try:
        main()
    except SearchrlError as error:
        if not tell_launcher(f"searchrl: {error}", error.exit_code):
            print(f"searchrl: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception:  # of whatever kind: the launcher prints it, or it goes on
        if not tell_launcher(traceback.format_exc(), 1):
            raise
        raise SystemExit(1) from None


if __name__ == "__main__":
    run()
