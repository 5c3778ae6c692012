"""The plan as people read it: in full, in one line, and beside what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from searchrl.config import Config
from searchrl.model_shape import find_shape
from searchrl.plan.memory import GIB, MemoryPlan, Phase, plan_memory
from searchrl.plan.tokens import TokenPlan, plan_tokens

MEMORY_COLUMNS = ("phase", "planned", "measured")
_MEASURED: dict[str, tuple[Phase, ...]] = {
    "rollout": (Phase.rollout,),
    "logprob": (Phase.logprob,),
    "update": (Phase.update, Phase.step),
    "sync": (Phase.sync,),
}
"""The phases that each ``memory/<name>_peak_gib`` covers."""


def describe(cfg: Config, *, world_size: int) -> str:
    """The plan as `searchrl validate` prints it, several lines; the last begins with the peak.

    Raises:
        DataError, ModelError: a data file or a model's configuration is malformed.
    """
    model = cfg.checkpoint or cfg.model.path
    shape = find_shape(model)
    lines = [*_token_lines(cfg, plan_tokens(cfg, world_size=world_size)), ""]
    if shape is None:
        lines.append(f"memory: unknown until {model} is on this machine (its shape is)")
        return "\n".join(lines)
    plan = plan_memory(cfg, shape, world_size=world_size)
    lines.append(
        f"memory of each rank of {world_size}: {model}, {shape.parameters:,} parameters, {cfg.model.dtype}, "
        f"ZeRO {cfg.deepspeed.zero_stage} (GiB, ~ marks estimates)"
    )
    return "\n".join([*lines, *_table(plan)])


def summary(cfg: Config, *, world_size: int) -> str:
    """The plan in one line, without reading data."""
    tokens = plan_tokens(cfg, world_size=world_size, read_data=False)
    shape = find_shape(cfg.checkpoint or cfg.model.path)
    memory = "memory unknown until the model is here"
    if shape is not None:
        plan = plan_memory(cfg, shape, world_size=world_size)
        memory = (
            f"about {plan.peak / GIB:.1f} GiB a rank, in {plan.peak_phase} (rollout "
            f"{plan.total(Phase.rollout) / GIB:.1f}, sync {plan.total(Phase.sync) / GIB:.1f})"
        )
    return (
        f"plan: {memory}; {tokens.trajectories_per_step} trajectories a step, {tokens.optimizer_steps:,} "
        "optimizer steps"
    )


def memory_rows(
    cfg: Config, records: Sequence[Mapping[str, float]], *, world_size: int
) -> list[tuple[str, str, str]]:
    """Rows under ``MEMORY_COLUMNS``: each phase's plan and its highest measured peak, GiB of a rank.

    Measured is the growth over ``memory/baseline_gib``: what a process held before anything was loaded.
    Phases that no record has measured are left out, and all of them where the model's shape is unknown.
    """
    shape = find_shape(cfg.checkpoint or cfg.model.path)
    if shape is None:
        return []
    plan = plan_memory(cfg, shape, world_size=world_size)
    rows = []
    for name, phases in _MEASURED.items():
        key = f"memory/{name}_peak_gib"
        grown = [record[key] - record.get("memory/baseline_gib", 0.0) for record in records if key in record]
        if grown:
            planned = max(plan.total(phase) for phase in phases) / GIB
            rows.append((name, f"{planned:.2f}", f"{max(grown):.2f}"))
    return rows


def _token_lines(cfg: Config, plan: TokenPlan) -> Iterator[str]:
    context = cfg.episode.max_context_tokens
    yield "tokens and steps"
    yield (
        f"  longest episode {plan.longest_episode:,} tokens, which leaves {context - plan.longest_episode:,} "
        f"of {context:,} to the prompt"
    )
    yield (
        f"  at most {plan.most_tokens_per_step:,} tokens a step; {plan.most_microbatches:,} micro-batches a "
        f"rank of {cfg.batching.max_tokens:,} tokens"
    )
    yield (
        f"  {plan.optimizer_steps:,} optimizer steps, {plan.optimizer_steps_per_rollout} on each rollout; "
        f"warm-up over {cfg.optimizer.warmup_steps:,} of {cfg.steps:,} rollouts"
    )
    drawn = f"  {plan.questions_drawn:,} questions drawn"
    if plan.train_questions:
        drawn += f" of {plan.train_questions:,}, {plan.questions_drawn / plan.train_questions:.2f} epochs"
    yield drawn + (f"; {plan.eval_questions:,} in the evaluation" if plan.eval_questions else "")


def _table(plan: MemoryPlan) -> Iterator[str]:
    """A row for each component, a column for each phase."""

    def row(name: str, cells: Sequence[str], note: str = "") -> str:
        return f"  {name:<20}{''.join(f'{cell:>9}' for cell in cells)}  {note}".rstrip()

    yield row("", plan.phases)
    for part in plan.components:
        sizes = [part.amounts.get(phase) for phase in plan.phases]
        cells = ["" if size is None else f"{size / GIB:.2f}" for size in sizes]
        yield row(f"{'~ ' if part.is_estimate else ''}{part.name}", cells, part.note)
    yield row("sum", [f"{plan.total(phase) / GIB:.2f}" for phase in plan.phases])
    offloaded = f"; {plan.offloaded / GIB:.2f} GiB of main memory to offload to" if plan.offloaded else ""
    yield f"  peak {plan.peak / GIB:.2f} GiB, in {plan.peak_phase}{offloaded}"
