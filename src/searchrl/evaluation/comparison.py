"""What training reports: greedy answers by hop count, before and after, with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

from searchrl.evaluation.intervals import Interval, Z, wilson
from searchrl.evaluation.results import Result


def paired_difference(before: Sequence[Result], after: Sequence[Result]) -> Interval:
    """Mean difference in exact match over the same questions, normal approximation over questions.

    Raises:
        ValueError: the two are not about the same questions in the same order, or fewer than two.
    """
    if [result.id for result in before] != [result.id for result in after] or len(before) < 2:
        raise ValueError("a paired difference needs the same questions, at least two, in the same order")
    pairs = zip(before, after, strict=True)
    differences = [float(b.exact_match) - float(a.exact_match) for a, b in pairs]
    n = len(differences)
    mean = sum(differences) / n
    half = Z * math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1) / n)
    return Interval(value=mean, low=mean - half, high=mean + half)


def by_hops(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results of all questions under ``all``, then by hop count where the data has one."""
    parts = {"all": list(results)}
    for hops in sorted({result.hops for result in results} - {0}):
        parts[f"{hops} hop"] = [result for result in results if result.hops == hops]
    return parts


def table_rows(results: Sequence[Result]) -> list[list[str]]:
    """Rows as ``TABLE_COLUMNS``; "gold shown": share with a gold answer in a document that was read."""
    return [
        [
            name,
            str(len(part)),
            str(wilson(sum(result.exact_match for result in part), len(part))),
            f"{_mean([result.searches for result in part]):.2f}",
            f"{_mean([result.retrieval_hit for result in part]):.3f}",
            f"{_mean([result.valid_format for result in part]):.3f}",
            str(sum(result.error is not None for result in part)),
        ]
        for name, part in by_hops(results).items()
    ]


TABLE_COLUMNS = ("questions", "n", "exact match [95 %]", "searches", "gold shown", "valid format", "void")


def comparison_rows(before: Sequence[Result], after: Sequence[Result]) -> list[list[str]]:
    """Rows of ``COMPARISON_COLUMNS``, all questions first, then by hop count."""
    rows = []
    after_parts = by_hops(after)
    for name, old in by_hops(before).items():
        new = after_parts[name]
        rows.append(
            [
                name,
                str(len(old)),
                f"{_mean([result.exact_match for result in old]):.3f}",
                f"{_mean([result.exact_match for result in new]):.3f}",
                str(paired_difference(old, new)) if len(old) > 1 else "n/a",
                f"{_mean([result.retrieval_hit for result in old]):.3f}",
                f"{_mean([result.retrieval_hit for result in new]):.3f}",
                f"{_mean([result.searches for result in old]):.2f}",
                f"{_mean([result.searches for result in new]):.2f}",
            ]
        )
    return rows


COMPARISON_COLUMNS = (
    "questions",
    "n",
    "exact match before",
    "exact match after",
    "paired difference [95 %]",
    "gold shown before",
    "gold shown after",
    "searches before",
    "searches after",
)


def side_by_side(before: Sequence[Result], after: Sequence[Result]) -> list[list[str]]:
    """The same as rows of ``SIDE_BY_SIDE``, which fit a terminal of 80 columns."""
    old, new = by_hops(before), by_hops(after)

    def change(part: str, field: str, digits: int) -> str:
        values = (_mean([getattr(result, field) for result in results[part]]) for results in (old, new))
        return "→".join(f"{value:.{digits}f}" for value in values)

    return [
        [
            part,
            n,
            change(part, "exact_match", 3),
            difference,
            change(part, "retrieval_hit", 2),
            change(part, "searches", 2),
        ]
        for part, n, _, _, difference, *_ in comparison_rows(before, after)
    ]


SIDE_BY_SIDE = ("hops", "n", "exact match", "paired difference [95 %]", "gold shown", "searches")


def eval_metrics(results: Sequence[Result]) -> dict[str, float]:
    """``eval/...`` numbers for the log."""
    metrics = {"eval/void": float(sum(result.error is not None for result in results))}
    for name, part in by_hops(results).items():
        suffix = "" if name == "all" else "_" + name.replace(" ", "_")
        metrics[f"eval/exact_match{suffix}"] = _mean([result.exact_match for result in part])
        metrics[f"eval/gold_shown{suffix}"] = _mean([result.retrieval_hit for result in part])
        metrics[f"eval/searches{suffix}"] = _mean([result.searches for result in part])
    return metrics


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
