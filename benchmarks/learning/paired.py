"""Two evaluations of the same questions side by side, with the paired difference: a Markdown table.

    python benchmarks/learning/paired.py runs/BEFORE runs/AFTER

Questions that only one of them has answered are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from searchrl.evaluation.comparison import COMPARISON_COLUMNS, comparison_rows
from searchrl.evaluation.results import finished_questions


def table(before: Path, after: Path) -> str:
    """The comparison of the first answers that two run directories of ``searchrl eval`` hold."""
    old, new = (finished_questions(run / "eval") for run in (before, after))
    shared = [name for name in old if name in new]
    rows = comparison_rows([old[name][0] for name in shared], [new[name][0] for name in shared])
    return "\n".join([_row(COMPARISON_COLUMNS), "|---" * len(COMPARISON_COLUMNS) + "|", *map(_row, rows)])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    args = parser.parse_args()
    print(table(args.before, args.after))


if __name__ == "__main__":
    main()
