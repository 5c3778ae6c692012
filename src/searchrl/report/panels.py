"""Which curves a report has: a panel each, with the metrics in it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any


@dataclass(kw_only=True, slots=True, frozen=True)
class Panel:
    """One chart over the steps of a run."""

    title: str
    note: str
    """What the reader should know, in a line."""
    series: tuple[tuple[str, str], ...]
    """(metric, label); in both ``*`` stands for the same anything."""
    kind: str = "line"
    """``line``, ``area`` (stacked shares) or ``bar`` (stacked amounts)."""
    compared: str = ""
    """The one metric that is drawn for each of several runs; empty: the first of ``series``."""
    log: bool = False
    """The vertical axis is logarithmic."""
    evaluation: str = ""
    """Which number of the evaluations is drawn in as well."""


PANELS = (
    Panel(
        title="Exact match",
        note="sampled, on training questions; greedy evaluations with 95 % intervals",
        series=(("reward/exact_match", "training"), ("reward/exact_match_*_hop", "training, * hop")),
        evaluation="exact_match",
    ),
    Panel(
        title="Reward",
        note="mean, and the parts that it is the sum of",
        series=(
            ("reward/mean", "reward"),
            *((f"reward/{name}", name.replace("_", " ")) for name in ("answer", "format", "evidence")),
            *((f"reward/{name}", name.replace("_", " ")) for name in ("retrieval", "custom", "search_cost")),
            ("reward/invalid_penalty", "invalid penalty"),
            ("reward/kl_penalty", "KL penalty"),
        ),
    ),
    Panel(
        title="Searches per trajectory",
        note="executed searches; greedy evaluations beside",
        series=(
            ("search_r1/search_calls_per_sample", "all"),
            ("search_r1/search_calls_*_hop", "* hop"),
        ),
        evaluation="searches",
    ),
    Panel(
        title="What searches find",
        note="share of searches with a gold answer; of trajectories that read one, or all the evidence",
        series=(
            ("retrieval/recall_at_k", "searches with gold"),
            ("retrieval/hit", "gold shown"),
            ("retrieval/evidence", "all evidence"),
        ),
        compared="retrieval/hit",
    ),
    Panel(
        title="Outcomes",
        note="how episodes ended, share of trajectories",
        series=(("rollout/outcome/*", "*"),),
        kind="area",
        compared="rollout/outcome/answered",
    ),
    Panel(
        title="Effective sample size",
        note="of the importance weights, relative to the tokens; what the correction cut or dropped",
        series=(
            ("tis/ess_ratio", "ESS ratio"),
            ("tis/truncated_fraction", "truncated"),
            ("tis/rejected_fraction", "rejected"),
            ("tis/masked_fraction", "masked"),
        ),
    ),
    Panel(
        title="Mismatch of trainer and engine",
        note="k3 estimate of the KL, and differences of log-probabilities in nats; logarithmic",
        series=(
            ("tis/k3", "KL (k3)"),
            ("tis/abs_logprob_diff_mean", "mean |difference|"),
            ("tis/abs_logprob_diff_max", "largest"),
            ("sync/probe_max_abs_diff", "probe after sync"),
        ),
        log=True,
    ),
    Panel(
        title="Entropy", note="of the policy at sampled tokens, nats", series=(("loss/entropy", "entropy"),)
    ),
    Panel(
        title="Lengths",
        note="tokens per trajectory: the policy's own, and with observations",
        series=(("rollout/sampled_tokens", "sampled"), ("rollout/response_tokens", "response")),
    ),
    Panel(
        title="Time of a step",
        note="seconds by phase",
        series=(("time/*", "*"),),
        kind="bar",
        compared="time/step",
    ),
    Panel(
        title="Memory at its peak",
        note="GiB of the fullest rank, by phase",
        series=(("memory/*_peak_gib", "*"),),
        compared="memory/update_peak_gib",
    ),
    Panel(
        title="KL to the reference",
        note="nats per token, where the loss has the penalty",
        series=(("loss/ref_kl", "KL"),),
    ),
    Panel(
        title="Loss",
        note="mean over the step's optimizer steps",
        series=(("loss/total", "total"), ("loss/policy_loss", "policy")),
    ),
    Panel(title="Gradient norm", note="before clipping", series=(("update/grad_norm", "norm"),)),
    Panel(title="Learning rate", note="of the step's last update", series=(("update/lr", "rate"),)),
    Panel(
        title="Groups that teach",
        note="share of groups whose rewards differ; format that the reward calls valid",
        series=(("rollout/informative_groups", "informative"), ("reward/valid_format", "valid format")),
    ),
)

_NOT_PHASES = {"time/step", "time/rollout_span"}


def chart_panels(
    names: Collection[str], nonzero: Collection[str], *, comparing: bool
) -> list[dict[str, Any]]:
    """The panels that have something to show, as the page takes them.

    Args:
        names: metrics that any of the runs has.
        nonzero: those that are not 0 throughout: only they get a curve among several.
        comparing: several runs share a panel.
    """
    charts = []
    for panel in PANELS:
        chosen = panel.compared or panel.series[0][0]
        series = list(_expanded(((chosen, chosen),) if comparing else panel.series, names, nonzero))
        if series or panel.evaluation:
            charts.append(
                {
                    "title": panel.title,
                    "note": chosen if comparing else panel.note,
                    "kind": "line" if comparing else panel.kind,
                    "log": panel.log,
                    "evaluation": panel.evaluation,
                    "series": [{"metric": metric, "label": label} for metric, label in series],
                }
            )
    return charts


def _expanded(
    series: Iterable[tuple[str, str]], names: Collection[str], nonzero: Collection[str]
) -> Iterable[tuple[str, str]]:
    for place, (pattern, label) in enumerate(series):
        if "*" not in pattern:
            # The first names the panel: that it is 0 is worth seeing.
            if pattern in names and (place == 0 or pattern in nonzero):
                yield pattern, label
            continue
        before, _, after = pattern.partition("*")
        found = [name for name in sorted(nonzero) if fnmatchcase(name, pattern) and name not in _NOT_PHASES]
        if place > 0 and len(found) == 1:
            continue  # the only part is the whole, which is there already
        for name in found:
            part = name[len(before) : len(name) - len(after)]
            yield name, label.replace("*", part.replace("_", " "))
