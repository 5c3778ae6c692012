"""One run, step by step: a Markdown table and two curves for docs/results.

    python benchmarks/learning/curve.py runs/worldfacts

The curves are Mermaid charts, which code hosts draw from the text.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "reward": ("reward/mean", "{:.3f}".format),
    "exact match": ("reward/exact_match", "{:.3f}".format),
    "both read": ("retrieval/evidence", "{:.3f}".format),
    "searches": ("search_r1/search_calls_per_sample", "{:.2f}".format),
    "informative groups": ("rollout/informative_groups", "{:.2f}".format),
    "entropy": ("loss/entropy", "{:.2f}".format),
    "rollout s": ("time/rollout", "{:.0f}".format),
    "update s": ("time/update", "{:.0f}".format),
    "sync s": ("time/sync", "{:.1f}".format),
    "GFLOP/s": ("machine/matmul_gflops", "{:.0f}".format),
    "probe": ("sync/probe_max_abs_diff", "{:.0e}".format),
}
CURVES = ("reward", "exact match", "searches")


def read_steps(run: Path) -> list[dict[str, float]]:
    """The records of ``metrics.jsonl`` that a training step wrote, in order."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [record for record in records if "time/step" in record]


def table(steps: Sequence[dict[str, float]]) -> str:
    """One row a step; a dash where the step had no such number."""
    lines = ["| step | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for record in steps:
        cells = [form(record[name]) if name in record else "–" for name, form in COLUMNS.values()]
        lines.append(f"| {record['step']:.0f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def curve(steps: Sequence[dict[str, float]], column: str) -> str:
    """One column over the steps, as a Mermaid chart."""
    name, _ = COLUMNS[column]
    known = [(record["step"], record[name]) for record in steps if name in record]
    return "\n".join(
        [
            "```mermaid",
            "xychart-beta",
            f'    title "{column}, by step"',
            f'    x-axis "step" [{", ".join(f"{step:.0f}" for step, _ in known)}]',
            f"    y-axis 0 --> {max(1.0, max(value for _, value in known)):g}",
            f"    line [{', '.join(f'{value:.3f}' for _, value in known)}]",
            "```",
        ]
    )


def main() -> None:
    """Print charts and table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run directory")
    steps = read_steps(parser.parse_args().run)
    print("\n\n".join([*(curve(steps, column) for column in CURVES), table(steps)]))


if __name__ == "__main__":
    main()
