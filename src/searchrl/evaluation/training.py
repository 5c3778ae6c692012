"""The evaluations of a training run: before, in between and after, and what they say of it."""

from __future__ import annotations

import json

from searchrl.data.readers import first_of_each_source
from searchrl.evaluation.closing import closing_lines
from searchrl.evaluation.comparison import (
    COMPARISON_COLUMNS,
    SIDE_BY_SIDE,
    TABLE_COLUMNS,
    comparison_rows,
    side_by_side,
    table_rows,
)
from searchrl.evaluation.results import AnswerLog, Result, load_results, save_results
from searchrl.evaluation.rollouts import evaluate
from searchrl.metrics import read_records
from searchrl.plan import MEMORY_COLUMNS, memory_rows
from searchrl.setup import Run


def evaluate_policy(run: Run, step: int, questions: int) -> list[Result]:
    """The policy's results on the first ``questions`` of every source, after ``step``. A collective.

    Raises:
        CleanStop: too many searches failed; or a rank was asked to stop.
    """
    env = run.env
    env.phases.beat(f"evaluation after step {step}")
    examples = first_of_each_source(env.eval_examples, questions)
    log = AnswerLog(env.run_dir / "trajectories" / f"eval-{step:06d}.rank{env.world.rank}.jsonl")
    label, total = f"evaluation after step {step}", len(examples[:: env.world.engines])
    progress = env.console.progress(label, total, detail=run.rollout.activity)
    with log, progress as advance:
        answered = evaluate(
            run.rollout,
            env.runner,
            list(enumerate(examples)),
            eos_text=env.protocol.eos_text,
            world=env.world,
            max_num_seqs=env.cfg.engine.max_num_seqs,
            max_failed_fraction=env.cfg.retrieval.max_failed_fraction,
            keep=log.write,
            on_finish=env.phases.alive(advance),
            stop=env.stop,
        )
    results = [result for example in examples for result in answered[example.id]]
    if env.world.is_main:
        save_results(env.run_dir / "eval" / f"step-{step:06d}.json", results)
    env.console.table(f"after step {step}", TABLE_COLUMNS, table_rows(results))
    return results


def evaluate_before(run: Run, start: int) -> list[Result] | None:
    """The initial policy's results: measured now or, in a resumed run, read back, if asked the same."""
    saved, asked = run.env.run_dir / "eval" / "step-000000.json", run.env.cfg.eval.questions
    if start == 0:
        return evaluate_policy(run, 0, asked) if run.env.cfg.eval.before else None
    results = load_results(saved) if saved.exists() else []
    now = [example.id for example in first_of_each_source(run.env.eval_examples, asked)]
    return results if [result.id for result in results] == now else None


def report(run: Run, before: list[Result] | None, after: list[Result]) -> None:
    """Print what training has changed, what memory it took, and where everything is."""
    if before is not None:
        title, rows = (
            "held-out questions, before and after reinforcement learning",
            comparison_rows(before, after),
        )
        run.env.console.table(title, SIDE_BY_SIDE, side_by_side(before, after))
        if run.env.world.is_main:
            named = [dict(zip(COMPARISON_COLUMNS, row, strict=True)) for row in rows]
            (run.env.run_dir / "comparison.json").write_text(json.dumps(named, indent=2), encoding="utf-8")
    cfg = run.env.cfg
    records = read_records(run.env.run_dir, cfg.steps)
    memory = memory_rows(cfg, records, world_size=run.env.world.size)
    if memory:
        title = "memory of a rank at its peak, GiB more than before anything was loaded"
        run.env.console.table(title, MEMORY_COLUMNS, memory)
    run.env.console.say(
        closing_lines(run.env.run_dir, records, group_size=cfg.group_size, before=before, after=after)
    )
