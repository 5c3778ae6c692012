"""Rules that notice a collapse: when each fires, that it fires once, and that healthy runs are left alone."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchrl.config import LoggerConfig, WatchAction, WatchConfig
from searchrl.metrics import read_records
from searchrl.sinks import MetricLog
from searchrl.watch import Watch, rules

METRICS = {rule.name: rule.metric for rule in rules(WatchConfig())}
# One step each at window 1: what was before, what is still within the bound, what is just beyond it.
BOUNDS = [
    ("likelihood", [-0.5, -0.2, -0.4], -0.499, -0.501),  # 0.3 below the highest
    ("entropy", [0.5, 0.2, 0.4], 0.699, 0.701),  # 3 x the lowest + 0.1
    ("mismatch", [], 0.51, 0.49),  # absolute
    ("gradient", [1.0, 2.0, 2.0, 2.0, 2.0, 9.0], 19.9, 20.1),  # 10 x the median
    ("ratio", [1.0, 2.0, 2.0, 2.0, 2.0, 9.0], 199.0, 201.0),  # 100 x the median
    ("drift", [0.01, 0.02, 0.02, 0.02, 0.02, 0.05], 0.299, 0.301),  # 10 x the median + 0.1
    ("repetition", [0.1, 0.05], 0.249, 0.251),  # the lowest + 0.2
    ("thinking", [20.0, 40.0, 30.0], 10.1, 9.9),  # a quarter of the highest
    ("unanswered", [0.3, 0.1], 0.499, 0.501),  # the lowest + 0.4
    ("searches", [2.0, 1.0], 0.51, 0.49),  # a quarter of the highest
]
WOBBLE = {  # a quickstart run that learnt, with one bad rollout on the way: step 10
    "collapse/logprob_correct": (
        [-0.476, -0.389, -0.281, -0.16, -0.137, -0.112, -0.099, -0.11, -0.091, -0.226, -0.102, -0.082]
    ),
    "loss/entropy": [1.663, 1.437, 0.994, 0.83, 0.294, 0.186, 0.13, 0.19, 0.231, 0.407, 0.177, 0.295],
    "update/grad_norm": [0.265, 0.197, 0.241, 0.295, 0.241, 0.17, 0.376, 0.338, 0.277, 0.415, 0.34, 0.48],
    "collapse/repetition": [0.032, 0.005, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.022, 0.161, 0.023, 0.0],
    "collapse/think_words": [0.0] * 12,
    "collapse/unanswered": [0.297, 0.188, 0.141, 0.109, 0.016, 0.0, 0.016, 0.0, 0.031, 0.469, 0.031, 0.031],
    "search_r1/search_calls_per_sample": (
        [0.766, 0.859, 0.891, 0.875, 0.969, 1.0, 1.0, 0.984, 0.906, 0.797, 0.984, 0.984]
    ),
    "tis/ess_ratio": [1.0] * 12,
    "tis/ratio_max": [1.0001] * 12,
    # From another run: of fifteen that make two optimizer steps a rollout, the one that moved the most.
    "loss/policy_k3": (
        [0.0016, 0.0042, 0.0094, 0.0283, 0.0083, 0.0024, 0.1103, 0.0011, 0.0024, 0.0006, 0.0032, 0.0011]
    ),
}
STEPS = st.lists(  # of three metrics, any of which may be missing
    st.dictionaries(
        st.sampled_from(["tis/ess_ratio", "loss/entropy", "update/grad_norm"]), st.floats(0.0, 50.0)
    ),
    max_size=30,
)


def fired(watch: Watch, metric: str, values: list[float]) -> list[tuple[int, str]]:
    """(step, rule) of every alarm, steps counted from 1."""
    return [
        (step, alarm.rule.name)
        for step, value in enumerate(values, start=1)
        for alarm in watch.observe({metric: value})
    ]


def test_every_rule_is_in_the_table() -> None:
    assert [row[0] for row in BOUNDS] == list(METRICS)


@pytest.mark.parametrize(("name", "before", "within", "beyond"), BOUNDS)
def test_each_bound(name: str, before: list[float], within: float, beyond: float) -> None:
    watch = Watch(WatchConfig(window=1))
    assert fired(watch, METRICS[name], [*before, within]) == []
    assert watch.metrics() == {f"watch/{other}": 0.0 for other in METRICS}
    (alarm,) = watch.observe({METRICS[name]: beyond})
    assert watch.alarms == [alarm]
    assert watch.metrics() == {f"watch/{other}": float(other == name) for other in METRICS}
    message = str(alarm)
    for part in (f"{name}: {METRICS[name]} is ", f"{beyond:.4g}", alarm.rule.meaning, alarm.rule.remedy):
        assert part in message


@pytest.mark.parametrize(("name", "before", "within", "beyond"), BOUNDS)
def test_an_alarm_is_raised_once_until_it_is_over(
    name: str, before: list[float], within: float, beyond: float
) -> None:
    start = [*before, within]
    series = [*start, beyond, beyond, beyond, within, within, beyond]
    watch = Watch(WatchConfig(window=1))
    assert fired(watch, METRICS[name], series) == [(len(start) + 1, name), (len(start) + 6, name)]


@pytest.mark.parametrize(("name", "before", "within", "beyond"), BOUNDS)
def test_what_is_bad_for_long_does_not_become_normal(
    name: str, before: list[float], within: float, beyond: float
) -> None:
    watch = Watch(WatchConfig(window=1))
    assert len(fired(watch, METRICS[name], [*before, within, *[beyond] * 100])) == 1
    assert len(watch.alarms) == 1


def test_a_mean_over_the_window_is_judged_not_a_step() -> None:
    """One step of three: 1/3 is within the bound of 0.4. Two: it is not. It is over when one is left."""
    watch = Watch(WatchConfig(window=3))
    series = [0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert fired(watch, METRICS["unanswered"], series) == [(9, "unanswered")]
    (alarm,) = Watch(WatchConfig(window=3), [{METRICS["unanswered"]: v} for v in series[:9]]).alarms
    assert alarm.mean == pytest.approx(2 / 3)
    assert (alarm.bound, alarm.window) == (0.4, 3)


@pytest.mark.parametrize("name", METRICS)
def test_the_first_window_has_nothing_to_be_compared_with(name: str) -> None:
    """A run that begins badly is no collapse. Engine and trainer have to agree from the start."""
    watch = Watch(WatchConfig(window=2))
    bad = {"likelihood": -9.0, "thinking": 0.0, "searches": 0.0, "mismatch": 0.1}.get(name, 1.0)
    assert fired(watch, METRICS[name], [bad] * 6) == ([(2, "mismatch")] if name == "mismatch" else [])


def test_a_step_without_the_metric_changes_nothing() -> None:
    watch = Watch(WatchConfig(window=2))
    metric = METRICS["gradient"]
    for metrics in ({metric: 1.0}, {}, {"other": 9.0}, {metric: 1.0}, {}):
        assert watch.observe(metrics) == []
    assert watch.observe({metric: 39.0})[0].mean == 20.0  # of the last two that there were
    assert watch.observe({}) == []
    assert watch.metrics()["watch/gradient"] == 1.0


def test_no_number_is_never_within_a_bound() -> None:
    watch = Watch(WatchConfig(window=1))
    assert fired(watch, METRICS["gradient"], [1.0, math.nan, 1.0, math.inf]) == [
        (2, "gradient"),
        (4, "gradient"),
    ]


def test_a_run_that_learns_and_wobbles_is_left_alone() -> None:
    watch = Watch(WatchConfig())
    assert set(WOBBLE) == set(METRICS.values())
    for values in zip(*WOBBLE.values(), strict=True):
        assert watch.observe(dict(zip(WOBBLE, values, strict=True))) == []


def test_the_same_run_going_on_like_its_bad_step_is_not() -> None:
    series = [*WOBBLE["collapse/unanswered"][:10], 0.5, 0.5, 0.5, 0.5]
    assert fired(Watch(WatchConfig()), METRICS["unanswered"], series) == [(14, "unanswered")]


@given(st.floats(-20, 0), st.floats(0, 100), st.floats(0, 1), st.floats(0.5, 1), st.integers(1, 5))
def test_a_constant_run_is_left_alone(
    logprob: float, amount: float, share: float, ess_ratio: float, window: int
) -> None:
    values = {"likelihood": logprob, "repetition": share, "unanswered": share, "mismatch": ess_ratio}
    watch = Watch(WatchConfig(window=window, min_ess_ratio=0.49))
    for _ in range(12):
        assert watch.observe({metric: values.get(name, amount) for name, metric in METRICS.items()}) == []


@given(STEPS, STEPS, st.integers(1, 4))
def test_a_watch_goes_on_from_the_records_as_if_it_had_seen_the_steps(
    first: list[dict[str, float]], second: list[dict[str, float]], window: int
) -> None:
    config = WatchConfig(window=window)
    whole, resumed = Watch(config), Watch(config, first)
    for metrics in first:
        whole.observe(metrics)
    for metrics in second:
        assert whole.observe(metrics) == resumed.observe(metrics)
        assert whole.metrics() == resumed.metrics()


def test_an_interrupted_run_raises_the_alarms_of_an_uninterrupted_one(tmp_path: Path) -> None:
    """Through the file: killed in step 9 with half a line written, resumed after step 6."""
    values = [1.0, 1.1, 0.7, 1.3, 50.0, 60.0, 55.0, 1.0, 1.0, 1.0, 90.0, 80.0]
    config = WatchConfig(window=2)
    whole = Watch(config)
    expected = [[str(alarm) for alarm in whole.observe({"update/grad_norm": value})] for value in values]
    log = MetricLog(tmp_path, LoggerConfig(), {}, say=print)
    watch = Watch(config)
    for step, value in enumerate(values[:8], start=1):
        watch.observe({"update/grad_norm": value})
        log.write(step, {"update/grad_norm": value, **watch.metrics()})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 9, "update/gr')
    resumed = Watch(config, read_records(tmp_path, 6))
    assert [alarm.rule.name for alarm in resumed.alarms] == ["gradient"]  # still on; not raised again
    again = [[str(alarm) for alarm in resumed.observe({"update/grad_norm": value})] for value in values[6:]]
    assert again == expected[6:]
    assert sum(map(len, again)) == 1


@pytest.mark.parametrize("action", WatchAction)
def test_only_stop_stops_and_a_resumed_run_too(action: WatchAction) -> None:
    config = WatchConfig(action=action, window=1)
    watch = Watch(config)
    assert not watch.must_stop()
    watch.observe({"tis/ess_ratio": 0.1})
    assert watch.must_stop() == (action.value == "stop")
    assert Watch(config, [{"tis/ess_ratio": 0.1}]).must_stop() == (action.value == "stop")
    watch.observe({"tis/ess_ratio": 0.9})
    assert not watch.must_stop()


def test_rules_can_be_left_out() -> None:
    watch = Watch(WatchConfig(window=1, ignore=("mismatch", "searches")))
    assert watch.observe({"tis/ess_ratio": 0.1}) == []
    assert set(watch.metrics()) == {f"watch/{name}" for name in METRICS} - {
        "watch/mismatch",
        "watch/searches",
    }


def test_thresholds_come_from_the_configuration() -> None:
    strict = WatchConfig(window=1, likelihood_fall=0.05, min_ess_ratio=0.95)
    assert fired(Watch(strict), "tis/ess_ratio", [0.96, 0.94]) == [(2, "mismatch")]
    assert fired(Watch(strict), METRICS["likelihood"], [-0.1, -0.14, -0.16]) == [(3, "likelihood")]
