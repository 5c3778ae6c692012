"""What an evaluation amounts to: every metric by data source, by hops and overall, with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from searchrl.evaluation.intervals import Interval, bootstrap, percentile_interval, ratios, wilson
from searchrl.evaluation.published import BENCHMARKS
from searchrl.evaluation.results import Result
from searchrl.trajectory import Outcome


class PartKind(StrEnum):
    """What the questions of a part have in common."""

    DATA_SOURCE = "data_source"
    HOPS = "hops"
    ALL = "all"
    AVERAGE = "average"
    """No questions of its own: the unweighted mean over the data sources, which papers call "Avg."."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Part:
    """One row of the table."""

    kind: PartKind
    name: str
    questions: int
    outcomes: dict[Outcome, int]
    """Answers by how their episode ended."""
    void: int
    """Answers that a failed search made void; they count as wrong."""
    metrics: dict[str, Interval | None]
    """Every metric by name; None where nothing was there to divide by."""


def pass_at(drawn: int, *, correct: int, samples: int) -> float:
    """Probability that one of ``drawn`` of the samples is right: unbiased (arXiv 2107.03374, equation 1)."""
    return 1.0 - math.comb(samples - correct, drawn) / math.comb(samples, drawn)


def summarize(answered: Mapping[str, Sequence[Result]], *, seed: int) -> list[Part]:
    """Data sources in published order, then others; hops; all; with several sources their average.

    Args:
        answered: the results of each question, as many for every one.
        seed: of the bootstrap.
    """
    questions = list(answered.values())
    rows, measured = [], []
    for name in sources(questions):
        of_source = [results for results in questions if results[0].data_source == name]
        measured.append(_measure(of_source, seed=seed, name=name))
        rows.append(_part(PartKind.DATA_SOURCE, name, of_source, measured[-1]))
    for hops in sorted({results[0].hops for results in questions} - {0}):
        of_hops = [results for results in questions if results[0].hops == hops]
        name = f"{hops} hop"
        rows.append(_part(PartKind.HOPS, name, of_hops, _measure(of_hops, seed=seed, name=name)))
    # Of one source these are the same questions, whose interval should not be drawn anew.
    whole = measured[0] if len(measured) == 1 else _measure(questions, seed=seed, name="all")
    rows.append(_part(PartKind.ALL, "all", questions, whole))
    if len(measured) > 1:
        average = _Measured(
            names=measured[0].names,
            values=np.mean([source.values for source in measured], axis=0),
            replicates=np.mean([source.replicates for source in measured], axis=0),
        )
        rows.append(_part(PartKind.AVERAGE, "average", questions, average))
    return rows


def sources(questions: Sequence[Sequence[Result]]) -> list[str]:
    """Names of the data sources in published order, others behind them by name."""
    found = {results[0].data_source for results in questions}
    return [name for name in BENCHMARKS if name in found] + sorted(found - BENCHMARKS.keys())


@dataclass(kw_only=True, slots=True, frozen=True)
class _Measured:
    """M metrics of some questions."""

    names: list[str]
    values: NDArray[np.float64]
    """[M] NaN where undefined."""
    replicates: NDArray[np.float64]
    """[RESAMPLES, M]"""


_SHARES = ("exact_match", "sub_exact_match", "valid_format", "recall", "gold_shown")


def _measure(questions: Sequence[Sequence[Result]], *, seed: int, name: str) -> _Measured:
    terms = [_terms(results) for results in questions]
    names = list(terms[0])
    numerators, denominators = (
        np.array([[term[metric][i] for metric in names] for term in terms], dtype=np.float64) for i in (0, 1)
    )
    return _Measured(
        names=names,
        values=ratios(numerators.sum(axis=0), denominators.sum(axis=0)),
        replicates=bootstrap(numerators, denominators, seed=seed, name=name),
    )


def _terms(results: Sequence[Result]) -> dict[str, tuple[float, float]]:
    """What one question adds to the numerator and to the denominator of every metric."""
    samples, correct = len(results), sum(result.exact_match for result in results)
    drawn = sorted({*(2**i for i in range(1, samples.bit_length()) if 2**i < samples), samples} - {1})
    searches = sum(result.searches for result in results)
    return {
        "exact_match": (correct, samples),
        **{f"pass@{j}": (pass_at(j, correct=correct, samples=samples), 1) for j in drawn},
        "f1": (sum(result.f1 for result in results), samples),
        "sub_exact_match": (sum(result.sub_exact_match for result in results), samples),
        "valid_format": (sum(result.valid_format for result in results), samples),
        "searches": (searches, samples),
        "recall": (sum(result.searches_with_gold > 0 for result in results), samples),
        "recall_per_search": (sum(result.searches_with_gold for result in results), searches),
        "gold_shown": (sum(result.retrieval_hit for result in results), samples),
        "sampled_tokens": (sum(result.sampled_tokens for result in results), samples),
        "total_tokens": (sum(result.total_tokens for result in results), samples),
    }


def _part(kind: PartKind, name: str, questions: Sequence[Sequence[Result]], measured: _Measured) -> Part:
    answers = [result for results in questions for result in results]
    counts = {outcome: sum(a.outcome is outcome for a in answers) for outcome in Outcome}
    metrics = {
        metric: _estimate(metric, float(measured.values[i]), measured.replicates[:, i], len(questions))
        for i, metric in enumerate(measured.names)
    }
    return Part(
        kind=kind,
        name=name,
        questions=len(questions),
        outcomes={outcome: count for outcome, count in counts.items() if count},
        void=sum(answer.outcome.is_void for answer in answers),
        metrics=metrics,
    )


def _estimate(metric: str, value: float, replicates: NDArray[np.float64], questions: int) -> Interval | None:
    if math.isnan(value):
        return None
    if value in (0.0, 1.0) and (metric in _SHARES or metric.startswith("pass@")):
        return wilson(value * questions, questions)  # all alike: every resample is too, but none else need be
    return percentile_interval(value, replicates)
