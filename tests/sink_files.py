"""What the sinks of a run hold, read with their own libraries."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from searchrl.metrics import read_records

Record = dict[str, Any]


def steps(run_dir: Path) -> list[Record]:
    """``metrics.jsonl``, the records of a step together."""
    merged: dict[float, Record] = {}
    for record in read_records(run_dir, 99):
        merged.setdefault(record["step"], {}).update(record)
    return list(merged.values())


def event_files(run_dir: Path) -> tuple[list[Record], Any]:
    """TensorBoard's scalars, by step, and what it read."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    found: dict[int, Record] = {}
    for name in accumulator.Tags()["scalars"]:
        events = accumulator.Scalars(name)
        assert len({event.step for event in events}) == len(events)  # nothing twice
        for event in events:
            found.setdefault(event.step, {"step": event.step})[name] = event.value
    return [found[step] for step in sorted(found)], accumulator


def wandb_records(path: Path) -> list[Any]:
    """The records of a ``.wandb`` file: LevelDB's log format after a header, wandb's messages in it."""
    from wandb.proto.wandb_internal_pb2 import Record as Message

    raw, at, parts, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(raw):
        left = 32768 - at % 32768
        _, length, kind = struct.unpack("<IHB", raw[at : at + 7]) if left >= 7 else (0, 0, 0)
        if kind == 0:  # the rest of the block is empty
            at += left
            continue
        parts += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(Message.FromString(parts))
            parts = b""
    return found


def wandb_steps(path: Path) -> list[Record]:
    """The history of a run of Weights & Biases, without what it adds itself."""
    rows = []
    for message in wandb_records(path):
        if message.WhichOneof("record_type") == "history":
            items: Record = {}
            for item in message.history.item:
                name, *inside = item.nested_key or [item.key]
                value = json.loads(item.value_json)
                items[name] = {**items.get(name, {}), inside[0]: value} if inside else value
            own = ("_runtime", "_timestamp", "_step")
            rows.append({"step": items["_step"]} | {k: v for k, v in items.items() if k not in own})
    return rows
