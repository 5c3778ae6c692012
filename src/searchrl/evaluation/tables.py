"""The benchmark's tables, for the console and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from searchrl.evaluation.intervals import Interval
from searchrl.evaluation.published import BENCHMARKS, PUBLISHED
from searchrl.evaluation.summary import Part, PartKind


@dataclass(kw_only=True, slots=True, frozen=True)
class Table:
    """A title, columns, and rows of as many cells."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[str]]
    note: str
    """What stands below it."""

    def markdown(self) -> str:
        """As GitHub renders it; numbers flush right."""
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"## {self.title}\n\n{table}\n\n{self.note}\n"


def result_table(parts: Sequence[Part], *, samples: int, top_k: int, title: str) -> Table:
    """Every part with its main metrics.

    Args:
        parts: of ``summarize``.
        samples: answers to each question.
        top_k: documents of a search.
        title: what was evaluated.
    """
    exact = ("EM [95 %]",) if samples == 1 else (f"EM avg@{samples} [95 %]", f"pass@{samples} [95 %]")
    columns = ("questions", "n", *exact, "F1", "sub-EM", "searches", f"recall@{top_k}", "sampled", "tokens")
    rows = []
    for part in parts:
        intervals = ["exact_match"] if samples == 1 else ["exact_match", f"pass@{samples}"]
        rows.append(
            [
                part.name,
                str(part.questions),
                *(str(part.metrics[metric]) for metric in intervals),
                *(_value(part.metrics[metric], 3) for metric in ("f1", "sub_exact_match")),
                _value(part.metrics["searches"], 2),
                _value(part.metrics["recall"], 3),
                *(_value(part.metrics[metric], 0) for metric in ("sampled_tokens", "total_tokens")),
                str(part.void),
            ]
        )
    note = (
        f"recall@{top_k}: share of questions for which a search found a gold answer. sampled, tokens: the "
        "policy's own, and all of the episode's, prompt included. void: answers lost to failed searches, "
        "counted as wrong."
    )
    return Table(title=title, columns=(*columns, "void"), rows=rows, note=note)


def published_table(parts: Sequence[Part], *, samples: int) -> Table | None:
    """Greedy exact match beside what papers report, or None if there is nothing to compare.

    Args:
        parts: of ``summarize``.
        samples: answers to each question; more than one are sampled, which no row here is.
    """
    ours = {part.name: part for part in parts if part.kind is PartKind.DATA_SOURCE}
    if samples > 1 or not ours.keys() & BENCHMARKS.keys():
        return None
    counts = {name: ours[name].questions if name in ours else 0 for name in BENCHMARKS}
    partial = any(0 < counts[name] != size for name, size in BENCHMARKS.items())
    values = [ours[name].metrics["exact_match"] if name in ours else None for name in BENCHMARKS]
    known = [value.value for value in values if value is not None]
    average = f"{sum(known) / len(known):.3f}" if len(known) == len(BENCHMARKS) else "-"
    label = "this model (partial)" if partial else "this model"
    rows = [[label, *(_value(value, 3) for value in values), average]]
    if partial:
        sizes = (f"{counts[name]} of {size}" if name in ours else "-" for name, size in BENCHMARKS.items())
        rows.append(["  its questions", *sizes, ""])
    for row in PUBLISHED:
        numbers = (
            ["-"] * len(BENCHMARKS) if row.exact_match is None else [f"{v:.3f}" for v in row.exact_match]
        )
        rows.append([row.system, *numbers, f"{row.average:.3f}"])
    sources = "; ".join(f"{row.system}: {row.source}" for row in PUBLISHED)
    return Table(
        title="exact match beside published results",
        columns=("system", *BENCHMARKS, "average"),
        rows=rows,
        note="Comparable only with the same retriever, corpus, documents a search and number of searches. "
        f"Sources: {sources}.",
    )


def _value(interval: Interval | None, digits: int) -> str:
    return "-" if interval is None else f"{interval.value:.{digits}f}"
