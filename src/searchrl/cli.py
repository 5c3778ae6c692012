"""Command line: ``searchrl <command> [Hydra overrides]``. Heavy imports happen behind the commands."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searchrl.compose import compose_config, load_config
from searchrl.environment import silence
from searchrl.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from searchrl.config import Config
    from searchrl.evaluation.summary import Part

_DESCRIPTION = """\
Teach a language model to search while it reasons.

  searchrl data worldfacts                     build the quickstart's corpus and questions
  searchrl train +experiment=quickstart        warm start, GRPO, evaluation before and after
  searchrl eval  +experiment=quickstart name=OTHER checkpoint=runs/NAME/model
  searchrl train +experiment=quickstart steps=5 group_size=4 optimizer.lr=1e-5
  searchrl doctor +experiment=quickstart       check the machine and all that this run needs
  searchrl config                              every setting: type, default, meaning

train, eval and warmstart start one process for each visible GPU; processes=N says otherwise.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script. Exit codes: docs/operations.md."""
    parser = argparse.ArgumentParser(
        prog="searchrl", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (help_text, function) in _HYDRA_COMMANDS.items():
        command = commands.add_parser(name, help=help_text, epilog="`searchrl config` explains every setting")
        command.add_argument("overrides", nargs="*", help="Hydra overrides, for example steps=10")
        if function is _doctor:
            command.add_argument("--deep", action="store_true", help="probe with the run's own model")
        command.set_defaults(function=function)
    for name, help_text, function in _FLAG_COMMANDS:
        command = commands.add_parser(name, help=help_text, add_help=False)
        command.set_defaults(function=function)
    words = sys.argv[1:] if argv is None else argv
    if not words:
        parser.print_help()
        raise SystemExit(2)
    if not words[0].startswith("-") and words[0] not in commands.choices:
        hint = did_you_mean(words[0], commands.choices)
        raise InputError(f"there is no command {words[0]!r}{hint or '; `searchrl --help` lists them'}")
    args, rest = parser.parse_known_args(words)
    if rest and args.function not in [function for *_, function in _FLAG_COMMANDS]:
        parser.error(f"unrecognized arguments: {' '.join(rest)}; settings are written key=value")
    args.rest = rest
    if args.command in _HYDRA_COMMANDS:
        silence()  # before a check imports what reads it
    if args.command in ("config", "validate", "completion"):
        _print(args)
    else:
        args.function(args)


def _print(args: argparse.Namespace) -> None:
    """Run a command that does nothing but print; its reader may leave early: ``searchrl config | head``."""
    try:
        args.function(args)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _train(args: argparse.Namespace) -> None:
    cfg, resolved = load_config(args.overrides)
    claim_run(cfg, resolved)
    if _launched(args, cfg):
        return
    from searchrl.evaluation.closing import commands

    run_training(cfg, resolved)
    if os.environ.get("RANK", "0") == "0":
        print(commands(Path(cfg.run_dir), args.overrides), flush=True)


def run_training(cfg: Config, resolved: dict[str, Any]) -> Path:
    """Train in this process, one of the run's ranks; the folder of the final model."""
    from searchrl.launcher import world_size
    from searchrl.plan import summary

    if os.environ.get("RANK", "0") == "0":
        print(summary(cfg, world_size=world_size(cfg)), flush=True)
    try:
        prepare(cfg)
        from searchrl.trainer import train

        return train(cfg, resolved)
    except KeyboardInterrupt:  # training that has begun takes it as a request, and saves
        message = "stopped before training began: nothing is lost, the same command starts again"
        print(f"searchrl: {message}", file=sys.stderr)
        raise


def _eval(args: argparse.Namespace) -> None:
    cfg, resolved = load_config(args.overrides, training=False)
    claim_run(cfg, resolved, training=False)
    if not _launched(args, cfg):
        run_evaluation(cfg, command=shlex.join(["searchrl", "eval", *args.overrides]))


def run_evaluation(cfg: Config, *, command: str) -> list[Part]:
    """Evaluate in this process, one of the ranks; the table's rows on the first, none on the others."""
    prepare(cfg)
    from searchrl.evaluation.benchmark import evaluate_checkpoint

    return evaluate_checkpoint(cfg, command=command)


def claim_run(cfg: Config, resolved: dict[str, Any], *, training: bool = True) -> None:
    """Refuse what this machine cannot do; create the run directory and record the configuration there.

    Raises:
        ConfigError: see ``check_machine``; or the directory holds another run or evaluation.
    """
    check_machine(cfg, training=training)
    _claim_run_dir(cfg, resolved, training=training)


def _launched(args: argparse.Namespace, cfg: Config) -> bool:
    """Give the command to several ranks on this machine, if it is to run in so many; True once they ended."""
    from searchrl.launcher import is_rank, launch, world_size

    if is_rank() or world_size(cfg) == 1:
        return False
    launch(["-m", "searchrl.cli", args.command, *args.overrides], world_size(cfg))
    return True


def _validate(args: argparse.Namespace) -> None:
    from searchrl.launcher import world_size
    from searchrl.plan import describe

    cfg, _ = load_config(args.overrides)
    plan = describe(cfg, world_size=world_size(cfg))
    print(
        f"valid: {cfg.steps} steps of {cfg.groups_per_step} groups x {cfg.group_size} = "
        f"{cfg.groups_per_step * cfg.group_size} trajectories, "
        f"{cfg.steps * cfg.groups_per_step * cfg.group_size} in all; run directory {cfg.run_dir}"
    )
    print(plan)
    if cfg.device_memory_gib:
        _check_memory(cfg)
        print(f"  fits {cfg.device_memory_gib:g} GiB")


def _warmstart(args: argparse.Namespace) -> None:
    cfg, _ = load_config(args.overrides)
    check_machine(cfg)
    if _launched(args, cfg):
        return
    prepare(cfg)
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


def _config(args: argparse.Namespace) -> None:
    from searchrl.config_cli import main as config

    config(args.rest)


def _completion(args: argparse.Namespace) -> None:
    parser = argparse.ArgumentParser(prog="searchrl completion")
    parser.add_argument("shell", choices=("bash",), help='for ~/.bashrc: eval "$(searchrl completion bash)"')
    parser.parse_args(args.rest)
    from searchrl.completion import bash

    flagged = [name for name, *_ in _FLAG_COMMANDS]
    print(bash([*_HYDRA_COMMANDS, *flagged], [*_HYDRA_COMMANDS, "config"]), end="")


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


def _play(args: argparse.Namespace) -> None:
    from searchrl.launcher import require_one_process
    from searchrl.play import argument_parser

    given = argument_parser().parse_intermixed_args(args.rest)
    cfg, _ = load_config(["processes=1", *given.overrides], training=False)
    require_one_process(cfg, "searchrl play")
    if not given.human:
        check_machine(cfg, training=False)
    prepare(cfg)
    from searchrl.play.session import play

    play(cfg, given)


def check_machine(cfg: Config, *, training: bool = True) -> None:
    """Refuse what this machine lacks: GPUs, packages, the model, memory.

    Raises:
        ConfigError: names what is missing, and what to do.
    """
    from searchrl.launcher import require_devices
    from searchrl.preflight import require_model, require_packages

    require_devices(cfg)
    require_packages(cfg)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        require_model(cfg)
    _check_memory(cfg, training=training)


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
    if evaluated if training else trained:
        other = "an evaluation" if training else "a training run"
        raise ConfigError(f"{run_dir} holds {other}, which cannot be continued so; choose another name=...")
    if (trained or evaluated) and not cfg.resume:
        raise ConfigError(
            f"{run_dir} holds a run already; continue it with resume=true, or choose another name=..."
        )
    if cfg.resume and training:
        check_settings(cfg)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.create(resolved), run_dir / "config.yaml")
    except OSError as error:
        raise ConfigError(
            f"run_dir={run_dir} cannot be written ({error.strerror}: {error.filename}); choose another with "
            "run_dir=... or make it writable"
        ) from error


def prepare(cfg: Config) -> None:
    """Set what must stand before torch is imported."""
    from searchrl.environment import prepare_environment
    from searchrl.model_shape import find_shape

    shape = find_shape(cfg.checkpoint or cfg.model.path)
    is_tiny = shape is not None and shape.parameters < _TINY_PARAMETERS
    prepare_environment(str(cfg.device), is_tiny=is_tiny)


_TINY_PARAMETERS = 10_000_000


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
    ("play", "ask a policy at the terminal and watch it search; or --human: act in its place", _play),
    ("report", "a run as one page: curves, tables and every trajectory; --compare, --watch", _report),
    ("config", "explain every setting, or show what a run would use", _config),
    ("completion", "print a script that teaches a shell to complete commands and settings", _completion),
    ("replay", "run a micro-batch again that was stopped because something is not finite", _replay),
)


def run() -> None:
    """``main`` with errors that explain themselves reported as one message instead of a traceback."""
    from searchrl.errors import own_words
    from searchrl.launcher import join_launcher, tell_launcher

    join_launcher()
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:  # of whatever kind: the launcher prints it, or it goes on
        message, code = own_words(error) or (None, 1)
        if not tell_launcher(f"searchrl: {message}" if message else traceback.format_exc(), code):
            if message is None:
                raise
            print(f"searchrl: {message}", file=sys.stderr)
        raise SystemExit(code) from error


if __name__ == "__main__":
    run()
