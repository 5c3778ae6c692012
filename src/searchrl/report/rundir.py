"""What a run directory holds, as a page needs it: curves, tables, the index of its trajectories."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from searchrl.config import Config
from searchrl.evaluation.comparison import TABLE_COLUMNS, by_hops, table_rows
from searchrl.evaluation.intervals import Interval, wilson
from searchrl.evaluation.results import Result, load_results
from searchrl.report.errors import ReportError
from searchrl.report.tokens import open_tokens
from searchrl.report.transcripts import (
    Part,
    TrajectoryFile,
    finite,
    index_columns,
    read_part,
    trajectory_files,
)

Table = dict[str, Any]
"""``title``, ``columns``, ``rows`` of as many cells, all text; ``note`` below."""

_PLACES = {"name", "run_dir", "resume", "resume_changes"}
"""Settings that say which run it is, not what it does."""


class RunReader:
    """Reads a run, and again what has changed since."""

    def __init__(self, run_dir: Path) -> None:
        """Raises ``ReportError`` if ``run_dir`` is no run directory."""
        if not run_dir.is_dir():
            raise ReportError(f"{run_dir} is no folder; name a run directory, for example runs/quickstart")
        if not any((run_dir / name).exists() for name in ("config.yaml", "metrics.jsonl")):
            raise ReportError(
                f"{run_dir} is not a run directory: it has neither config.yaml nor metrics.jsonl; name the "
                "folder that `searchrl train` or `searchrl eval` made"
            )
        self.run_dir = run_dir
        self.settings, self._settings_note = _settings(run_dir)
        self._tokens = open_tokens(run_dir, self.settings)
        self._parts: dict[Path, tuple[tuple[tuple[int, int], ...], Part]] = {}
        self._others: list[tuple[Path, int, int]] = []

    def refresh(self) -> bool:
        """Read trajectory files that are new or changed; whether anything of the run has changed."""
        files = trajectory_files(self.run_dir)
        known, self._parts = self._parts, {}
        before, self._others = self._others, _other_files(self.run_dir)
        changed = before != self._others or len(known) != len(files)
        for file in files:
            signature = file.signature
            if file.path not in known or known[file.path][0] != signature:
                changed = True
                self._parts[file.path] = (signature, self._read(file))
            else:
                self._parts[file.path] = known[file.path]
        return changed

    def _read(self, file: TrajectoryFile) -> Part:
        if self._tokens is None:  # a run in progress has no model yet, and may get one
            self._tokens = open_tokens(self.run_dir, self.settings)
        return read_part(file, self._tokens)

    @property
    def chunks(self) -> dict[str, bytes]:
        """Of all files, in the order of the index, by names that change with the content."""
        chunks = [chunk for _, part in self._parts.values() for chunk in part.chunks]
        return {f"{place}-{zlib.crc32(chunk):08x}": chunk for place, chunk in enumerate(chunks)}

    def data(self) -> dict[str, Any]:
        """Everything but the chunks, as JSON takes it; ``refresh`` comes first."""
        steps, metrics, damaged = read_metrics(self.run_dir)
        evaluations, unreadable = _evaluations(self.run_dir)
        parts = [part for _, part in self._parts.values()]
        lost = sum(part.damaged for part in parts)
        notes = [*self._settings_note, *unreadable]
        if damaged:
            notes.append(f"Left out, since unreadable: {_lines(damaged)} of metrics.jsonl.")
        if lost:
            notes.append(f"Left out, since unreadable: {_lines(lost)} of the trajectory files.")
        if parts and self._tokens is None:
            notes.append("The model's tokenizer.json is not on this machine: turns are shown without tokens.")
        if not steps and not evaluations and not parts:
            notes.append("The run has written nothing yet.")
        return {
            "name": self.run_dir.resolve().name,
            "steps": steps,
            "metrics": metrics,
            "evaluations": [_drawn(step, results) for step, results in evaluations],
            "tables": list(self._tables(evaluations)),
            "figures": key_figures(metrics),
            "notes": notes,
            "index": index_columns(parts),
            "chunks": list(self.chunks),
        }

    def _tables(self, evaluations: Sequence[tuple[int, list[Result]]]) -> Iterator[Table]:
        for step, results in evaluations:
            yield {
                "title": f"Held-out questions after step {step}",
                "columns": TABLE_COLUMNS,
                "rows": table_rows(results),
                "note": "",
            }
        yield from _written_tables(self.run_dir)
        rows = differing_settings(self.settings)
        if rows:
            yield {
                "title": "Settings that differ from the defaults",
                "columns": ("setting", "value", "default"),
                "rows": rows,
                "note": "",
            }


def _other_files(run_dir: Path) -> list[tuple[Path, int, int]]:
    """What ``data`` reads anew every time, as it is now."""
    paths = [
        run_dir / "metrics.jsonl",
        run_dir / "comparison.json",
        *sorted((run_dir / "eval").glob("*.json")),
    ]
    stats = [(path, path.stat()) for path in paths if path.exists()]
    return [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]


def read_metrics(run_dir: Path) -> tuple[list[int], dict[str, list[float | None]], int]:
    """Steps, every metric at each of them (None: not measured), and how many lines could not be read.

    A step's later record completes an earlier one: evaluations are written after their step.
    """
    by_step: dict[int, dict[str, float | None]] = {}
    damaged, path = 0, run_dir / "metrics.jsonl"
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
            values = {str(name): finite(value) for name, value in record.items() if name != "step"}
            by_step.setdefault(int(record["step"]), {}).update(values)
        except (ValueError, KeyError, TypeError, AttributeError):
            damaged += 1
    steps = sorted(by_step)
    names = sorted({name for values in by_step.values() for name in values})
    return steps, {name: [by_step[step].get(name) for step in steps] for name in names}, damaged


def differing_settings(settings: Mapping[str, object]) -> list[list[str]]:
    """Name, value and default of the settings that differ; of unknown ones the default is empty."""
    defaults = _flat(asdict(Config()))
    return [
        [name, _shown(value), _shown(defaults[name]) if name in defaults else ""]
        for name, value in settings.items()
        if name not in _PLACES and _shown(value) != _shown(defaults.get(name, ...))
    ]


_FIGURES = (
    "reward/exact_match",
    "reward/mean",
    "search_r1/search_calls_per_sample",
    "retrieval/hit",
    "rollout/sampled_tokens",
    "rollout/void",
    "loss/entropy",
    "tis/ess_ratio",
    "tis/k3",
    "update/grad_norm",
    "time/step",
    "eval/exact_match",
)


def key_figures(metrics: Mapping[str, Sequence[float | None]]) -> list[dict[str, Any]]:
    """First, last, least and most of what one looks at first."""
    figures = []
    for name in _FIGURES:
        values = [value for value in metrics.get(name, ()) if value is not None]
        if values:
            figures.append(
                {"name": name, "first": values[0], "last": values[-1], "min": min(values), "max": max(values)}
            )
    return figures


def _settings(run_dir: Path) -> tuple[dict[str, object], list[str]]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    path = run_dir / "config.yaml"
    if not path.exists():
        return {}, ["config.yaml is missing: the run's settings are not known."]
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, OSError):
        return {}, ["config.yaml could not be read: the run's settings are not known."]
    return (_flat(loaded), []) if isinstance(loaded, dict) else ({}, ["config.yaml holds no settings."])


def _flat(settings: Mapping[Any, Any], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _evaluations(run_dir: Path) -> tuple[list[tuple[int, list[Result]]], list[str]]:
    """Answers by step, and a note for each file that could not be read."""
    found, notes = [], []
    for path in sorted((run_dir / "eval").glob("step-*.json")):
        try:
            results = load_results(path)
            table_rows(results)
            found.append((int(path.stem.removeprefix("step-")), results))
        except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
            reason = f"{type(error).__name__}: {error}"
            notes.append(f"Left out, since unreadable: eval/{path.name} ({reason}).")
    return found, notes


def _drawn(step: int, results: Sequence[Result]) -> dict[str, Any]:
    """An evaluation as points with intervals, by hops."""
    parts = []
    for name, part in by_hops(results).items():
        exact = wilson(sum(result.exact_match for result in part), len(part))
        searches = sum(result.searches for result in part) / len(part)
        points = {"exact_match": exact, "searches": Interval(value=searches, low=searches, high=searches)}
        parts.append({"name": name, **{metric: asdict(point) for metric, point in points.items()}})
    return {"step": step, "parts": parts}


def _written_tables(run_dir: Path) -> Iterator[Table]:
    """What training or ``searchrl eval`` has compared itself."""
    comparison, summary = run_dir / "comparison.json", run_dir / "eval" / "summary.json"
    if rows := _json(comparison):
        yield {
            "title": "Before and after training",
            "columns": list(rows[0]),
            "rows": [list(map(str, row.values())) for row in rows],
            "note": "Paired difference: over the same questions.",
        }
    if parts := (_json(summary) or {}).get("parts"):
        names = list(parts[0]["metrics"])
        yield {
            "title": "Evaluation",
            "columns": ["questions", "n", *(name.replace("_", " ") for name in names), "void"],
            "rows": [
                [p["name"], str(p["questions"]), *(_estimate(p["metrics"][n]) for n in names), str(p["void"])]
                for p in parts
            ],
            "note": "With 95 % intervals. Void: answers lost to failed searches, counted as wrong.",
        }


def _estimate(interval: Mapping[str, float] | None) -> str:
    return "–" if interval is None else str(Interval(**interval))


def _json(path: Path) -> Any:
    """What the file holds; None if it is not there or not whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _lines(count: int) -> str:
    return "1 line" if count == 1 else f"{count} lines"
