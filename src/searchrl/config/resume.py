"""Which settings a resumed run may change: one place decides for every field of the schema.

What is not named here decides what is learnt, and must stay. What is named says how, where and how often
something is done: results differ by rounding at most. Some settings are compared by content instead, which
the checkpoint identifies: the model's files, the questions, the index (see ``checkpoint.identity``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from searchrl.config.schema import Config, Schedule

MAY_DIFFER = frozenset(
    {
        # Names and places; how long, and how a run is continued.
        *("name", "run_dir", "assets", "steps", "resume", "resume_changes"),
        # The machine.
        *("device", "processes", "device_memory_gib", "stall_timeout_s"),
        *("model.gradient_checkpointing", "model.attention"),
        *("engine", "deepspeed", "batching"),
        # Checks, sinks and files.
        *("sync", "eval", "saving", "watch", "logger"),
        # Compared by content.
        *("model.path", "checkpoint", "data.train", "data.eval"),
        *("retrieval.kind", "retrieval.corpus", "retrieval.index", "retrieval.dense_index"),
        *("retrieval.index_path", "retrieval.encoder", "retrieval.encoder_family", "retrieval.web"),
        *("retrieval.cache", "retrieval.urls", "retrieval.import_path", "retrieval.kwargs"),
        # How searches and verdicts travel, and how patient a run is.
        *("retrieval.devices", "retrieval.timeout_s", "retrieval.deadline_s", "retrieval.max_concurrency"),
        *("retrieval.max_failed_fraction", "retrieval.patience_s", "episode.deadline_s"),
        *("reward.judge.url", "reward.judge.timeout_s", "reward.judge.max_concurrency", "reward.judge.cache"),
    }
)
"""Keys, or whole sections."""

COMPARED_BY_CONTENT = ("model", "retrieval")
"""What ``resume_changes`` may name beside keys; not the training questions, in which the sampler goes on."""


def settings_to_keep(cfg: Config) -> dict[str, Any]:
    """By dotted key every setting that a resumed run must share with its checkpoint, as JSON values."""
    kept = dict(_leaves(cfg, ""))
    if cfg.optimizer.schedule is Schedule.linear:  # which ends at the last step
        kept["steps"] = cfg.steps
    return kept


def _leaves(section: Any, prefix: str) -> list[tuple[str, Any]]:
    """Depth first, without what may differ."""
    found: list[tuple[str, Any]] = []
    for entry in fields(section):
        key, value = prefix + entry.name, getattr(section, entry.name)
        if key in MAY_DIFFER:
            continue
        found += _leaves(value, f"{key}.") if is_dataclass(value) else [(key, _plain(value))]
    return found


def _plain(value: Any) -> Any:
    """What reading it back from JSON gives."""
    match value:
        case list() | tuple():
            return [_plain(item) for item in value]
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case str():
            return str(value)  # members of enumerations are strings
        case _:
            return value
