"""If a plan fits, and which settings would make it fit: found by planning again with each of them changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass

from searchrl.config import Config, ConfigError, Device, DType
from searchrl.model_shape import ModelShape, find_shape
from searchrl.plan.machine import Memory, rank_memory
from searchrl.plan.memory import GIB, MemoryPlan, kv_bytes_per_token, plan_memory

RESERVE_GIB = 1.0
"""Of a rank's memory that no plan may use: libraries, CUDA's context, what allocators hold back."""
TRUSTED_SHARE = 0.75
"""Of an estimate that a refusal relies on: measured runs stayed below their plans by up to a quarter."""
FEWEST_SEQUENCES = 8
"""Full-length sequences that a smaller key-value cache must still hold."""
MOST_RANKS = 64
"""More are not suggested."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Case:
    """A configuration on so many ranks."""

    cfg: Config
    shape: ModelShape
    world_size: int
    training: bool

    def plan(self) -> MemoryPlan:
        """Its memory."""
        return plan_memory(self.cfg, self.shape, world_size=self.world_size, training=self.training)


Change = tuple[str, Case]
"""A setting as one writes it, and the case with it."""
Knob = Callable[[Case, int], Iterator[Change]]
"""Ever stronger changes of one setting to a case that exceeds its memory by so many bytes."""


def check_fits(cfg: Config, *, world_size: int, local_ranks: int, training: bool = True) -> None:
    """Refuse a run that cannot fit into ``device_memory_gib`` or, if that is 0, into this machine.

    Estimates count by ``TRUSTED_SHARE`` only, and nothing is refused whose model or memory is unknown.

    Args:
        cfg: the run's.
        world_size: ranks of the run.
        local_ranks: ranks on this machine.
        training: False for an evaluation.

    Raises:
        ConfigError: it cannot; names the phase, its largest parts, and settings that would make it fit.
        ModelError: a model's configuration is malformed.
    """
    shape = find_shape(cfg.checkpoint or cfg.model.path)
    if shape is None:
        return
    case = Case(cfg=cfg, shape=shape, world_size=world_size, training=training)
    text = refusal(case, _memory(cfg, local_ranks))
    if text:
        raise ConfigError(text)


def _memory(cfg: Config, local_ranks: int) -> Memory:
    if cfg.device_memory_gib:
        size = int(cfg.device_memory_gib * GIB)
        return Memory(device=size, host=None, source="device_memory_gib")
    return rank_memory(cfg.device, local_ranks)


def refusal(case: Case, memory: Memory) -> str:
    """Why the case cannot run in that memory, and what would make it fit; empty if it may fit."""
    plan = case.plan()
    if memory.host is not None and plan.offloaded > memory.host:
        return (
            f"a rank offloads {_gib(plan.offloaded)} (optimizer, reference) to main memory, of which "
            f"{_gib(memory.host)} a rank is free here; use more ranks, deepspeed.zero_stage=1 or more, or "
            "adapters (model.lora.rank=32)"
        )
    if memory.device is None:
        return ""
    room = memory.device - int(RESERVE_GIB * GIB)
    worst = max(plan.phases, key=lambda phase: plan.total(phase, estimates=TRUSTED_SHARE))
    if plan.total(worst, estimates=TRUSTED_SHARE) <= room:
        return ""
    parts = sorted(plan.components, key=lambda part: -part.amounts.get(worst, 0))[:4]
    largest = ", ".join(f"{part.name} {_gib(part.amounts[worst])}" for part in parts if worst in part.amounts)
    lines = [
        f"{case.cfg.checkpoint or case.cfg.model.path} cannot fit: a rank of {case.world_size} needs about "
        f"{_gib(plan.total(worst))} in phase {worst}, but has {_gib(memory.device)} ({memory.source}), of "
        f"which {RESERVE_GIB:g} are for libraries; largest: {largest}",
        *(f"  - {remedy}" for remedy in remedies(case, room)),
    ]
    return "\n".join(lines)


def remedies(case: Case, room: int) -> list[str]:
    """Settings that make the case fit into ``room`` bytes, each with the peak that it leads to.

    First those that do so alone, in the order of what they cost; if none does, the fewest together.
    """
    alone = [change for knob in _KNOBS if (change := _mildest(knob, case, room)) is not None]
    if alone:
        return [_told([text], changed) for text, changed in alone]
    used: list[Knob] = []
    for knob in _KNOBS:
        used.append(knob)
        if _combined(used, case, room)[1].plan().peak <= room:
            break
    for knob in list(used):  # what a later setting has made needless
        fewer = [other for other in used if other is not knob]
        if _combined(fewer, case, room)[1].plan().peak <= room:
            used = fewer
    # Last, what can be turned by any amount: no further than the others leave to do.
    settings, changed = _combined(sorted(used, key=lambda knob: knob is _kv_cache), case, room)
    if changed.plan().peak > room:
        return ["nothing that this plan knows makes it fit: use larger devices, or a smaller model"]
    return [_told(settings, changed)]


def _combined(knobs: Sequence[Knob], case: Case, room: int) -> tuple[list[str], Case]:
    """All knobs turned, one after the other, as far as each helps and is still needed."""
    settings: list[str] = []
    for knob in knobs:
        change = _mildest(knob, case, room) or _strongest(knob, case, room)
        if change is not None and case.plan().peak > room:
            settings.append(change[0])
            case = change[1]
    return settings, case


def _told(settings: Sequence[str], changed: Case) -> str:
    return f"{' '.join(settings)}: {_gib(changed.plan().peak)} at the peak"


def _mildest(knob: Knob, case: Case, room: int) -> Change | None:
    """The first change that fits."""
    fitting = (change for change in knob(case, _excess(case, room)) if change[1].plan().peak <= room)
    return next(fitting, None)


def _strongest(knob: Knob, case: Case, room: int) -> Change | None:
    """The change that lowers the peak most, if any lowers it by a hundredth."""
    changes = list(knob(case, _excess(case, room)))
    best = min(changes, key=lambda change: change[1].plan().peak, default=None)
    return best if best is not None and best[1].plan().peak < 0.99 * case.plan().peak else None


def _excess(case: Case, room: int) -> int:
    return max(0, case.plan().peak - room)


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


def _changed(case: Case, change: Callable[[Config], None]) -> Case:
    cfg = deepcopy(case.cfg)
    change(cfg)
    return Case(cfg=cfg, shape=case.shape, world_size=case.world_size, training=case.training)


# --- settings, cheapest first ---------------------------------------------------------------------------


def _checkpointing(case: Case, excess: int) -> Iterator[Change]:
    def change(cfg: Config) -> None:
        cfg.model.gradient_checkpointing = True

    if case.training and not case.cfg.model.gradient_checkpointing:
        yield "model.gradient_checkpointing=true", _changed(case, change)


def _max_tokens(case: Case, excess: int) -> Iterator[Change]:
    tokens, least = case.cfg.batching.max_tokens, case.cfg.episode.max_context_tokens
    while case.training and tokens > least:
        tokens = max(least, tokens // 2)

        def change(cfg: Config, tokens: int = tokens) -> None:
            cfg.batching.max_tokens = tokens

        yield f"batching.max_tokens={tokens}", _changed(case, change)


def _chunk(case: Case, excess: int) -> Iterator[Change]:
    chunk = case.cfg.batching.logprob_chunk
    while case.training and chunk > 128:
        chunk = max(128, chunk // 2)

        def change(cfg: Config, chunk: int = chunk) -> None:
            cfg.batching.logprob_chunk = chunk

        yield f"batching.logprob_chunk={chunk}", _changed(case, change)


def _kv_cache(case: Case, excess: int) -> Iterator[Change]:
    cfg = case.cfg
    full = kv_bytes_per_token(cfg, case.shape) * cfg.episode.max_context_tokens
    least = min(cfg.engine.kv_cache_gib, FEWEST_SEQUENCES * full / GIB)
    for size in (cfg.engine.kv_cache_gib - excess / GIB, least):
        size = int(size * 100) / 100  # what is written must be what fits
        if max(least - 0.01, 0.0) < size < cfg.engine.kv_cache_gib:

            def change(cfg: Config, size: float = size) -> None:
                cfg.engine.kv_cache_gib = size

            yield f"engine.kv_cache_gib={size:g}", _changed(case, change)


def _sequences(case: Case, excess: int) -> Iterator[Change]:
    count = case.cfg.engine.max_num_seqs
    while count > 16:
        count = max(16, count // 2)

        def change(cfg: Config, count: int = count) -> None:
            cfg.engine.max_num_seqs = count

        yield f"engine.max_num_seqs={count}", _changed(case, change)


def _stage(case: Case, excess: int) -> Iterator[Change]:
    for stage in range(case.cfg.deepspeed.zero_stage + 1, 4):

        def change(cfg: Config, stage: int = stage) -> None:
            cfg.deepspeed.zero_stage = stage

        if case.training and case.world_size > 1:
            yield f"deepspeed.zero_stage={stage}", _changed(case, change)


def _ranks(case: Case, excess: int) -> Iterator[Change]:
    """On GPUs, where every rank brings a device."""
    ranks = 2 * case.world_size
    while case.training and case.cfg.device is Device.cuda and ranks <= MOST_RANKS:
        if case.cfg.groups_per_step % ranks == 0:
            more = Case(cfg=case.cfg, shape=case.shape, world_size=ranks, training=True)
            yield f"{ranks} ranks", more
        ranks *= 2


def _bfloat16(case: Case, excess: int) -> Iterator[Change]:
    def change(cfg: Config) -> None:
        cfg.model.dtype = DType.bfloat16
        cfg.deepspeed.zero_stage = max(1, cfg.deepspeed.zero_stage)

    if case.cfg.model.dtype is DType.float32 and case.cfg.device is Device.cuda:
        changed = _changed(case, change)
        stage = changed.cfg.deepspeed.zero_stage
        text = "" if stage == case.cfg.deepspeed.zero_stage else f" deepspeed.zero_stage={stage}"
        yield f"model.dtype=bfloat16{text}", changed


def _no_reference(case: Case, excess: int) -> Iterator[Change]:
    def change(cfg: Config) -> None:
        cfg.loss.kl_coef = 0.0

    if case.training and case.cfg.loss.kl_coef > 0 and not case.cfg.model.lora.rank:
        yield "loss.kl_coef=0", _changed(case, change)


def _adapters(case: Case, excess: int) -> Iterator[Change]:
    def change(cfg: Config) -> None:
        cfg.model.lora.rank = 32

    if case.training and not case.cfg.model.lora.rank:
        yield "model.lora.rank=32", _changed(case, change)


_KNOBS: tuple[Knob, ...] = (
    _checkpointing,
    _max_tokens,
    _chunk,
    _kv_cache,
    _sequences,
    _stage,
    _ranks,
    _bfloat16,
    _no_reference,
    _adapters,
)
