"""`searchrl eval`: answers the held-out questions, resumes where it was killed, and makes the table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from searchrl.config import Config, ConfigError, SamplingConfig
from searchrl.data.files import replacing
from searchrl.data.readers import first_of_each_source
from searchrl.data.sampler import fingerprint
from searchrl.distributed import broadcast_object
from searchrl.evaluation.results import AnswerLog, Result, drop_partial_line, finished_questions
from searchrl.evaluation.rollouts import GREEDY, evaluate
from searchrl.evaluation.summary import Part, summarize
from searchrl.evaluation.tables import Table, published_table, result_table
from searchrl.setup import Environment, initial_policy, load_policy, open_environment
from searchrl.sources import source_settings
from searchrl.trajectory import Example


def evaluate_checkpoint(cfg: Config, *, command: str) -> list[Part]:
    """Evaluate the configured model on ``data.eval``; the tables go to ``run_dir/eval``. A collective.

    Returns their rows on the main rank, nothing on the others.

    Args:
        cfg: a configuration that is valid for an evaluation.
        command: what the user typed, for the record.

    Raises:
        ConfigError: ``resume=true`` with answers that were given under other settings.
        TooManyFailures: too many searches failed; the answers so far are kept.
    """
    with open_environment(cfg, training=False) as env:
        model = initial_policy(env)
        examples = first_of_each_source(env.eval_examples, cfg.eval.questions)
        settings: dict[str, Any] = {}
        finished: dict[str, list[Result]] = {}
        if env.world.is_main:
            settings = eval_settings(cfg, model, examples)
            finished = claim(env.run_dir, settings)
        finished = broadcast_object(finished)
        answered = _answer(env, model, examples, finished)
        parts: list[Part] = []
        if env.world.is_main:
            parts = summarize(answered, seed=cfg.seed)
            tables = _tables(cfg, parts, model, len(examples), len(env.eval_examples))
            for table in tables:
                env.console.table(table.title, table.columns, table.rows)
                env.console.say(table.note)
            _write(env.run_dir / "eval", parts, tables, settings, command)
            env.console.say(f"tables: {env.run_dir / 'eval' / 'table.md'}")
        return parts


def _answer(
    env: Environment, model: Path | str, examples: Sequence[Example], finished: Mapping[str, list[Result]]
) -> dict[str, list[Result]]:
    """Results of every question in the order of ``examples``, those of ``finished`` included."""
    cfg, world = env.cfg, env.world
    pending = [(index, e) for index, e in enumerate(examples) if e.id not in finished]
    if finished:
        env.console.say(f"resume: {len(finished)} of {len(examples)} questions are answered already")
    answered: dict[str, list[Result]] = {}
    if pending:  # else the tables are made anew without loading anything
        run = load_policy(env, model)
        log = AnswerLog(
            env.run_dir / "trajectories" / f"eval.rank{world.rank}.jsonl",
            env.run_dir / "eval" / f"results.rank{world.rank}.jsonl",
            append=True,
        )
        total = len(pending[:: world.engines]) * cfg.eval.samples
        progress = env.console.progress("answers", total, detail=run.rollout.activity)
        with log, progress as advance:
            answered = evaluate(
                run.rollout,
                env.runner,
                pending,
                eos_text=env.protocol.eos_text,
                world=world,
                max_num_seqs=cfg.engine.max_num_seqs,
                max_failed_fraction=cfg.retrieval.max_failed_fraction,
                samples=cfg.eval.samples,
                sampling=_sampling(cfg),
                finished=len(finished) * cfg.eval.samples,
                keep=log.write,
                on_finish=advance,
            )
    return {e.id: finished[e.id] if e.id in finished else answered[e.id] for e in examples}


def _sampling(cfg: Config) -> SamplingConfig:
    return GREEDY if cfg.eval.samples == 1 else SamplingConfig(temperature=cfg.eval.temperature)


def eval_settings(cfg: Config, model: Path | str, examples: Sequence[Example]) -> dict[str, Any]:
    """Everything that decides the answers, by name: two evaluations with equal settings are one.

    Args:
        cfg: the configuration.
        model: folder or hub name of the policy.
        examples: the questions.
    """
    greedy = cfg.eval.samples == 1
    sampled = f"{cfg.eval.samples} at temperature {cfg.eval.temperature:g}, seed {cfg.seed}"
    episode = asdict(cfg.episode)
    del episode["deadline_s"]
    return {
        "model": str(model),
        "model files": _digest(Path(model)) if isinstance(model, Path) else "of the hub",
        "model.dtype": str(cfg.model.dtype),
        "samples": "greedy" if greedy else sampled,
        "questions": f"{len(examples)} of {cfg.data.eval}, sha256 {fingerprint(examples)}",
        "retrieval": " ".join(source_settings(cfg)),
        "retrieval.shuffle_documents": cfg.retrieval.shuffle_documents,
        **{f"episode.{name}": value for name, value in episode.items()},
    }


def _digest(folder: Path) -> str:
    """SHA-256 over names and contents of a checkpoint's files: training on changes it, moving it does not."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def claim(run_dir: Path, settings: dict[str, Any]) -> dict[str, list[Result]]:
    """Record the settings, or check them against those recorded; what is answered already, by question id.

    Raises:
        ConfigError: the recorded settings are others; names each.
    """
    folder = run_dir / "eval"
    recorded = folder / "settings.json"
    if not recorded.exists():
        with replacing(recorded) as fresh:
            fresh.write_text(json.dumps(settings, indent=2), encoding="utf-8")
        return {}
    before = json.loads(recorded.read_text(encoding="utf-8"))
    now = json.loads(json.dumps(settings))
    differing = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if differing:
        raise ConfigError(
            f"resume=true cannot continue {folder}, which was begun with other settings:\n"
            + "\n".join(
                f"  - {name}: {before.get(name)!r} there, {now.get(name)!r} here" for name in differing
            )
            + "\nrestore them, or choose another name=..."
        )
    for path in (run_dir / "trajectories").glob("eval.rank*.jsonl"):
        drop_partial_line(path)
    return finished_questions(folder)


def _tables(cfg: Config, parts: Sequence[Part], model: Path | str, asked: int, held: int) -> list[Table]:
    some = f"; {asked} of {held} questions (eval.questions={cfg.eval.questions})" if asked < held else ""
    shuffled = ", shuffled" if cfg.retrieval.shuffle_documents else ""
    title = f"{cfg.checkpoint or model} on {cfg.data.eval}, retrieval {cfg.retrieval.kind}{shuffled}{some}"
    results = result_table(parts, samples=cfg.eval.samples, top_k=cfg.episode.top_k, title=title)
    published = published_table(parts, samples=cfg.eval.samples)
    return [results] if published is None else [results, published]


def _write(
    folder: Path, parts: Sequence[Part], tables: Sequence[Table], settings: dict[str, Any], command: str
) -> None:
    summary = {"command": command, "settings": settings, "parts": [asdict(part) for part in parts]}
    (folder / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
    text = f"    {command}\n\n" + "\n".join(table.markdown() for table in tables)
    (folder / "table.md").write_text(text, encoding="utf-8")
