"""The command line end to end: real model, engine, DeepSpeed, search server; killed, resumed, on two ranks.

Two ranks start by themselves in one run, under torchrun in another.

smoke's policy is tiny, but its warm start teaches it to search, and sometimes to answer in the right form:
so searches, rewards and gradients are all there.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from example import ROOT, custom_overrides
from integration.launch import (
    child,
    gone,
    python,
    rank,
    read_until,
    run,
    served_port,
    started,
    wait_for_event,
)
from sink_files import event_files, steps, wandb_steps

pytestmark = pytest.mark.integration

SETTINGS = ("+experiment=smoke", "eval.questions=4", "retrieval.timeout_s=5")
SERVER = "searchrl.retrieval.server"
EVERYTHING = (  # besides custom functions: adapters, an engine over both ranks, all that one step can hold
    "steps=2",
    "overlap=true",
    "model.lora.rank=4",
    "optimizer.lr=1e-3",
    "update={epochs: 2, minibatches: 2}",
    "loss={llds_coef: 0.1, entropy_coef: 0.001, aggregation: sequence}",
    "importance={normalize: true, rejection: {level: geometric}}",
    "filters.overlong=true",
    "resampling={max_rounds: 2, oversample: 1.5}",
    "engine.tensor_parallel=2",
)
AHEAD = ("overlap=true", "saving={every: 2, keep: 5}", "eval.before=false")
KEYS = {  # in the environment of every run here; nothing that a run writes or prints holds one
    name: f"canary-of-{name.lower().replace('_', '-')}-0123456789abcdef"
    for name in (
        "JUDGE_API_KEY",
        "SERPER_API_KEY",
        "BRAVE_API_KEY",
        "MCP_TOKEN",
        "SEARCHRL_RETRIEVAL_TOKEN",
        "WANDB_API_KEY",
        "HF_TOKEN",
    )
}
PROMISED = (  # PROTOCOL §5
    "search_r1/turns_per_sample",
    "search_r1/search_calls_per_sample",
    "reward/exact_match",
    "reward/format",
    "loss_mask/observation_fraction",
    "retrieval/recall_at_k",
    "rollout/policy_lag",
    "retrieval/latency_p50",
    "retrieval/latency_p99",
    "retrieval/failed",
    "rollout/outcome/answered",
    "rollout/zero_variance_groups",
    "sync/probe_max_abs_diff",
    "time/rollout",
    "time/update",
    "time/sync",
    "memory/rollout_peak_gib",
    "memory/update_peak_gib",
)
WITH_AN_UPDATE = (
    "loss/ref_kl",
    "tis/effective_sample_size",
    "tis/ess_ratio",
    "update/grad_norm",
    "loss/policy_loss",
)


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    code: int
    printed: str
    seconds: float = 0.0
    server_gone: bool = True


@dataclass(frozen=True)
class Bench:
    """A working directory with assets."""

    folder: Path

    def command(self, name: str, *overrides: object, mode: str = "train", ranks: int = 1) -> list[str]:
        arguments = [mode, *SETTINGS, f"name={name}", *overrides]
        return python("searchrl.cli", arguments, ranks=ranks)

    def run(self, name: str, *overrides: object, mode: str = "train", ranks: int = 1) -> Ended:
        command = self.command(name, *overrides, mode=mode, ranks=ranks)
        ended = run(command, cwd=self.folder, timeout_s=300)
        return Ended(ended.returncode, ended.stdout)

    def at(self, name: str) -> Path:
        return self.folder / "runs" / name

    def records(self, name: str) -> list[dict[str, Any]]:
        lines = (self.at(name) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def steps(self, name: str) -> list[dict[str, Any]]:
        """Records of training steps; evaluations stand beside them."""
        return [record for record in self.records(name) if "time/step" in record]

    def trajectories(self, name: str, file: str) -> list[dict[str, Any]]:
        lines = (self.at(name) / "trajectories" / file).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def bench(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Corpus and index of the checkout, built if need be; models and warm start of its own."""
    if not (assets / "worldfacts" / "manifest.json").exists():
        arguments = ["data", "worldfacts", "--out", assets / "worldfacts", "--wheels", assets / "wheels"]
        ended = run(python("searchrl.cli", arguments), cwd=assets.parent, timeout_s=300)
        assert ended.returncode == 0, ended.stdout
    folder = tmp_path_factory.mktemp("cli")
    (folder / "assets").mkdir()
    for name in ("worldfacts", "indexes"):
        (assets / name).mkdir(exist_ok=True)
        (folder / "assets" / name).symlink_to(assets / name)
    (folder / "examples").symlink_to(ROOT / "examples")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in KEYS.items():
            patch.setenv(name, value)
        yield Bench(folder)


@pytest.fixture(scope="module")
def finished(bench: Bench) -> Ended:
    """Four steps without interruption; makes the warm start that the other runs use."""
    ended = bench.run("finished", "steps=4", "saving={every: 2, keep: 5}", "sync.checksum=true")
    assert ended.code == 0, ended.printed
    return ended


def killed_trainer(bench: Bench) -> Ended:
    """Killed in the third step, after the checkpoint of the second."""
    command = bench.command("killed", "steps=50", *AHEAD)
    with started(command, cwd=bench.folder, timeout_s=300) as process:
        printed = read_until(process, "step 3/50")
        server = child(process.pid, SERVER)
        process.kill()
        return Ended(process.wait(), printed, server_gone=gone(server, 10))


def resumed(bench: Bench) -> Ended:
    """The killed run, continued to its fourth step, killed again while it saves that, and continued."""
    killed = killed_trainer(bench)
    shutil.copytree(bench.at("killed"), bench.at("resumed"))
    continued = ("steps=4", *AHEAD, "resume=auto")
    with started(bench.command("resumed", *continued), cwd=bench.folder, timeout_s=300) as process:
        wait_for_event(bench.at("resumed") / "events.jsonl", "checkpoint_begun", step=4)
        process.kill()
        printed, _ = process.communicate()
    ended = bench.run("resumed", *continued)
    return Ended(ended.code, printed + ended.printed, server_gone=killed.server_gone)


def fewer_ranks(bench: Bench) -> tuple[Ended, Ended]:
    """Two ranks until they are asked to stop, then one to the fourth step."""
    first = two_ranks(bench)
    shutil.copytree(bench.at("two"), bench.at("fewer"))
    return first, bench.run("fewer", "steps=4", "saving={every: 0}", "resume=true")


def signalled(bench: Bench, name: str, at: str, sent: signal.Signals, *overrides: object) -> Ended:
    """The search server gets a signal when the run has printed ``at``."""
    with started(bench.command(name, *overrides), cwd=bench.folder, timeout_s=300) as process:
        printed = read_until(process, at)
        os.kill(child(process.pid, SERVER), sent)
        start = time.monotonic()
        rest, _ = process.communicate()
    return Ended(process.returncode, printed + rest, seconds=time.monotonic() - start)


IMPATIENT = ("retrieval.timeout_s=1", "retrieval.deadline_s=2", "retrieval.patience_s=1")


def preempted(bench: Bench) -> tuple[Ended, Ended]:
    """Asked to stop after the second step; then continued to the fourth."""
    with started(bench.command("preempted", "steps=50"), cwd=bench.folder, timeout_s=300) as process:
        printed = read_until(process, "step 2/50")
        server = child(process.pid, SERVER)
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate()
    stopped = Ended(process.returncode, printed + rest, server_gone=gone(server, 10))
    return stopped, bench.run("preempted", "steps=4", "resume=true")


def interrupted(bench: Bench) -> Ended:
    """Ctrl-C while the engine loads."""
    heeds = ["env", "--default-signal=INT"]  # a shell's job in the background ignores it
    command = [*heeds, *bench.command("interrupted")]
    with started(command, cwd=bench.folder, timeout_s=300) as process:
        printed = read_until(process, "engine: loading")
        server = child(process.pid, SERVER)
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate()
    return Ended(process.returncode, printed + rest, server_gone=gone(server, 10))


def two_ranks(bench: Bench) -> Ended:
    """After the second step the second rank alone is asked to stop."""
    with started(bench.command("two", "steps=50", "processes=2"), cwd=bench.folder, timeout_s=300) as process:
        printed = read_until(process, "step 2/50")
        ranks = [rank(process.pid, number) for number in (0, 1)]
        os.kill(ranks[1], signal.SIGUSR1)
        rest, _ = process.communicate()
    return Ended(process.returncode, printed + rest, server_gone=all(gone(pid, 1) for pid in ranks))


def continued(bench: Bench) -> Ended:
    """The finished run with three more steps, of which at least the last has a server that hangs."""
    shutil.copytree(bench.at("finished"), bench.at("continued"))
    overrides = ("steps=7", "resume=true", "retrieval.max_failed_fraction=1", *IMPATIENT)
    return signalled(bench, "continued", "step 5/7", signal.SIGSTOP, *overrides)


def watched(bench: Bench) -> tuple[Ended, Ended]:
    """Stopped by a rule whose bound no update can keep; then continued by one step."""
    settings = (
        *("overlap=true", "eval.before=false", "watch={action: stop, window: 1, min_ess_ratio: 1}"),
        *("logger=[wandb_offline,tensorboard]", "logger.trajectories_every=1"),
    )
    stopped = bench.run("watched", "steps=50", *settings)
    last = bench.records("watched")[-1]["step"]
    more = ("resume=true", "watch.action=warn", f"steps={last + 1}", "eval.questions=1")
    return stopped, bench.run("watched", *settings, *more)


def other_index(bench: Bench) -> Ended:
    """A server elsewhere, replaced during the run by one over another corpus on the same port."""
    folder = bench.folder / "other"
    folder.mkdir()
    passage = {"id": "0", "contents": '"Nowhere"\nNothing is known.'}
    (folder / "corpus.jsonl").write_text(json.dumps(passage) + "\n", encoding="utf-8")
    build = [
        "index",
        "build",
        "--corpus",
        folder / "corpus.jsonl",
        "--out",
        folder / "index",
        "--kind",
        "bm25",
    ]
    built = run(python("searchrl.cli", build), cwd=folder, timeout_s=120)
    assert built.returncode == 0, built.stdout
    served = ["--index", bench.folder / "assets" / "indexes" / "worldfacts-bm25"]
    served += ["--corpus", bench.folder / "assets" / "worldfacts" / "corpus.jsonl"]
    swapped = ["--index", folder / "index", "--corpus", folder / "corpus.jsonl"]
    with started(python(SERVER, served), cwd=folder, timeout_s=300) as server:
        port = served_port(read_until(server, "serving on port"))
        urls = ("retrieval=http", f"retrieval.urls=[http://127.0.0.1:{port}]", "steps=50")
        with started(bench.command("swapped", *urls), cwd=bench.folder, timeout_s=300) as process:
            printed = read_until(process, "step 1/50")
            server.kill()
            server.wait()
            with started(python(SERVER, [*swapped, "--port", port]), cwd=folder, timeout_s=300):
                rest, _ = process.communicate()
    return Ended(process.returncode, printed + rest)


def with_a_tool(bench: Bench, model: Path) -> Ended:
    """The examples' sums with the examples' calculator, one step from a policy that searches."""
    written = run(python("examples.sums", ["sums"]), cwd=bench.folder, timeout_s=60)
    assert written.returncode == 0, written.stdout
    data = ("data.train=sums/train.jsonl", "data.eval=sums/test.jsonl", "data.prompt_column=prompt")
    tool = ("retrieval=custom", "retrieval.import_path=examples.calculator:Calculator")
    policy = (f"model.path={model}", "warmstart.demonstrations=0")
    return bench.run("tool", "steps=1", *data, *tool, "+retrieval.kwargs.digits=2", *policy)


@pytest.fixture(scope="module")
def later(bench: Bench, finished: Ended) -> Iterator[dict[str, Future[Any]]]:
    """Everything that can start once there is a finished run, two at a time."""
    assert finished.code == 0
    model = bench.at("finished") / "model"
    jobs: dict[str, Callable[[], Any]] = {
        "ahead": lambda: bench.run("ahead", "steps=4", *AHEAD),
        "resumed": lambda: resumed(bench),
        "continued": lambda: continued(bench),
        "survived": lambda: signalled(bench, "survived", "step 1/4", signal.SIGKILL, "steps=4"),
        "stopped": lambda: signalled(bench, "stopped", "step 1/50", signal.SIGSTOP, "steps=50", *IMPATIENT),
        "swapped": lambda: other_index(bench),
        "watched": lambda: watched(bench),
        "preempted": lambda: preempted(bench),
        "interrupted": lambda: interrupted(bench),
        "two ranks": lambda: fewer_ranks(bench),
        "custom": lambda: bench.run("custom", *custom_overrides()[2:], *EVERYTHING, ranks=2),
        "doctor": lambda: bench.run("doctor", mode="doctor"),
        "eval": lambda: bench.run(
            "judged", f"checkpoint={model}", "engine.tensor_parallel=2", mode="eval", ranks=2
        ),
        "tool": lambda: with_a_tool(bench, model),
        "none": lambda: bench.run(
            "none", "steps=1", "retrieval=none", f"model.path={model}", "warmstart.demonstrations=0"
        ),
    }
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(job) for name, job in jobs.items()}


def same(records: list[dict[str, Any]], others: list[dict[str, Any]], tolerance: float) -> None:
    """All metrics agree but for times and what depends on them, such as how many searches travel together."""
    timed = (
        "time/",
        "retrieval/latency",
        "retrieval/requests",
        "retrieval/retries",
        "memory/",
        "sync/seconds",
        "sync/load",
        "throughput/",
        "machine/",
        "sync/probe",
    )
    assert len(records) == len(others)
    for record, other in zip(records, others, strict=True):
        compared = [name for name in record if not name.startswith(timed)]
        assert compared == [name for name in other if not name.startswith(timed)]
        for name in compared:
            assert record[name] == pytest.approx(other[name], rel=tolerance, abs=tolerance), name


def streams(record: dict[str, Any]) -> list[tuple[list[int], str]]:
    """What the turns of a recorded trajectory say; times are left out."""
    return [(turn["token_ids"], turn["appended"]) for turn in record["turns"]]


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    """A recorded trajectory but for how long its searches took."""
    return {**record, "turns": [{**turn, "search_seconds": None} for turn in record["turns"]]}


OURS = (  # every line of a run whose output goes to a pipe
    r"plan: about .* GiB a rank, .*",
    r"retriever: bm25 index over assets/worldfacts/corpus\.jsonl",
    r"warm start: 8 demonstrations, for example",
    r"engine: loading assets/warmstart/[0-9a-f]{16}",
    r"sync: engine and trainer agree to \S+ nats",
    r"(after step \d|held-out questions, before and after reinforcement learning)",
    r"memory of a rank at its peak, GiB more than before anything was loaded",
    r"[┏┃┡│└].*[┓┃┩│┘]",  # tables
    r"step +time +left +reward .*",
    r"step \d/4 .*",
    r"(exact match|steps|time|look further)  +\S.*",
    r"(model|metrics|trajectories|evaluations|checkpoints|retriever)  +runs/finished/\S+",
    r" {14}searchrl (eval|play) .*",
)


def test_a_run_prints_its_steps_its_comparison_and_nothing_that_is_not_its_own(finished: Ended) -> None:
    example = r"(?s)(?<=for example\n)<\|im_start\|>user\n.*?</answer>\n"
    lines = re.sub(example, "", finished.printed).splitlines()
    assert [line for line in lines if not any(re.fullmatch(ours, line) for ours in OURS)] == []
    assert re.search(r"[\x00-\x09\x0b-\x1f\x7f]", finished.printed) is None
    steps = [line.split()[1] for line in lines if line.startswith("step ")]
    assert steps == ["time", "1/4", "2/4", "3/4", "4/4"]  # below a header, and no bars
    assert "held-out questions, before and after reinforcement learning" in finished.printed


def test_where_everything_is_is_said_and_true(bench: Bench, finished: Ended) -> None:
    places = dict(re.findall(r"^(\w+) +(runs/finished/\S+)$", finished.printed, re.MULTILINE))
    named = {"model", "metrics", "trajectories", "evaluations", "checkpoints", "retriever"}
    assert set(places) == named
    assert all((bench.folder / place).exists() for place in places.values())
    steps = bench.steps("finished")
    assert re.search(
        rf"^steps +{len(steps)}; {16 * len(steps)} trajectories, ", finished.printed, re.MULTILINE
    )


def test_a_run_directory_is_complete(bench: Bench, finished: Ended) -> None:
    del finished
    folder = bench.at("finished")
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "config.yaml",
        "metrics.jsonl",
        "events.jsonl",
        "retriever.log",
        "comparison.json",
        "model",
    }
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == [
        "step-000002",
        "step-000004",
    ]
    assert {path.name for path in (folder / "eval").iterdir()} == {"step-000000.json", "step-000004.json"}
    assert "max_turn_tokens: 64" in (folder / "config.yaml").read_text(encoding="utf-8")
    comparison = json.loads((folder / "comparison.json").read_text())
    assert [(row["questions"], row["n"]) for row in comparison][:1] == [("all", "4")]


def test_every_step_logs_every_promised_metric(bench: Bench, finished: Ended) -> None:
    del finished
    steps = bench.steps("finished")
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    for record in steps:
        expected = PROMISED + (WITH_AN_UPDATE if record["rollout/informative_groups"] > 0 else ())
        assert [name for name in expected if name not in record] == []
        assert all(math.isfinite(value) for value in record.values())
        assert record["sync/probe_max_abs_diff"] <= 1e-3
        assert record["search_r1/search_calls_per_sample"] > 0.5  # else the faults below show nothing
    # Both before and after the checkpoint that a killed run resumes from there is something to learn.
    assert any("update/grad_norm" in record for record in steps[:2])
    assert any("update/grad_norm" in record for record in steps[2:])
    assert "eval/exact_match" in bench.records("finished")[-1]


TURNS = [  # of every step, DESIGN §4: what sleeps and moves on a GPU passes by here as well
    ("phase_start", "rollout"),
    ("phase_end", "rollout"),
    ("phase_start", "swap"),
    ("engine_sleep", True),
    ("actor_reload", True),
    ("phase_end", "swap"),
    ("phase_start", "logprob"),
    ("phase_end", "logprob"),
    ("phase_start", "update"),
    ("phase_end", "update"),
    ("phase_start", "rollout"),  # with overlap the step waits here for the next one
    ("phase_end", "rollout"),
    ("phase_start", "swap"),
    ("actor_offload", True),
    ("phase_end", "swap"),
    ("phase_start", "sync"),
    ("engine_wake", "weights"),
    ("weights_loaded", "its own"),
    ("prefix_cache_reset", None),
    ("checksum_passed", "its own"),
    ("engine_wake", "kv_cache"),
    ("probe_passed", "its own"),
    ("phase_end", "sync"),
]


def told(event: dict[str, Any]) -> tuple[str, object]:
    """An event's kind and what matters about it; a version is that of its step, or told as it is."""
    version = "its own" if event.get("version") == event["step"] else event.get("version")
    for detail in ("phase", "part"):
        if detail in event:
            return event["event"], event[detail]
    return event["event"], event.get("noop", version)


def test_engine_and_trainer_take_turns_in_order(bench: Bench, finished: Ended) -> None:
    del finished
    text = (bench.at("finished") / "events.jsonl").read_text(encoding="utf-8")
    events = [json.loads(line) for line in text.splitlines()]
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)
    save = [
        ("engine_sleep", True),
        ("actor_reload", True),
        ("checkpoint_begun", None),
        ("checkpoint_saved", None),
        ("actor_offload", True),
    ]
    for step in (1, 2, 3, 4):
        saves = {1: 0, 2: 1, 3: 0, 4: 1}[step]  # every second step; the last is not saved twice
        assert [told(event) for event in events if event["step"] == step] == TURNS + save * saves
    # The engine is there before the trainer, and sleeps while that is built.
    start = [told(event)[0] for event in events if event["step"] == 0]
    turns = [name for name, _ in TURNS if not name.startswith("phase")]
    assert start == ["run_start", "engine_sleep", *turns[turns.index("actor_offload") :]]


def test_every_trajectory_is_recorded_whole(bench: Bench, finished: Ended) -> None:
    del finished
    for step in (1, 2, 3, 4):
        records = bench.trajectories("finished", f"step-{step:06d}.rank0.jsonl")
        assert len(records) == 4 * 4
        for record in records:
            assert record["reward"] is not None
            sampled = sum(count for tag, count in record["provenance"] if tag == "sampled")
            assert sampled == sum(len(turn["token_ids"]) for turn in record["turns"])
            for turn in record["turns"]:
                assert turn["policy_version"] == step - 1
                assert len(turn["logprobs"]) == len(turn["token_ids"])
                assert turn["query"] is not None or not turn["documents"]
        assert any(turn["documents"] for record in records for turn in record["turns"])


def test_the_trained_model_loads_in_transformers(bench: Bench, finished: Ended) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    del finished
    folder = bench.at("finished") / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)("question", return_tensors="pt").input_ids
    assert model(input_ids=ids).logits.isfinite().all()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_second_start_is_refused(bench: Bench, finished: Ended) -> None:
    del finished
    before = (bench.at("finished") / "metrics.jsonl").read_bytes()
    ended = bench.run("finished", "steps=4")
    assert ended.code == 2
    assert "runs/finished holds a run already; continue it with resume=true" in ended.printed
    assert "Traceback" not in ended.printed
    assert (bench.at("finished") / "metrics.jsonl").read_bytes() == before


def test_no_search_server_outlives_a_trainer_killed_by_kill_9(later: dict[str, Future[Ended]]) -> None:
    assert later["resumed"].result().server_gone


def test_rollouts_run_ahead_of_training_but_not_across_a_checkpoint(
    bench: Bench, later: dict[str, Future[Ended]]
) -> None:
    ended = later["ahead"].result()
    assert ended.code == 0, ended.printed
    assert "Warning" not in ended.printed
    steps = bench.steps("ahead")
    assert [record["rollout/policy_lag"] for record in steps] == [0, 1, 0, 1]
    same(steps[:1], bench.steps("finished")[:1], tolerance=0.0)
    older = []
    for before, record in pairwise([{}, *steps]):
        if "tis/ess_ratio" in record:
            older.append(record["rollout/policy_lag"] == 1 and "update/grad_norm" in before)
            # What one update changes is far more than what engine and trainer disagree on.
            assert (record["tis/abs_logprob_diff_max"] > 1e-2) == older[-1]
    assert any(older)
    for step in (1, 2, 3, 4):
        for record in bench.trajectories("ahead", f"step-{step:06d}.rank0.jsonl"):
            lag = steps[step - 1]["rollout/policy_lag"]
            assert {turn["policy_version"] for turn in record["turns"]} == {step - 1 - lag}


def test_a_killed_run_resumes_exactly(bench: Bench, later: dict[str, Future[Ended]]) -> None:
    """With ``overlap``, which has more that can go wrong."""
    assert later["ahead"].result().code == 0
    ended = later["resumed"].result()
    assert ended.code == 0, ended.printed
    first, second = [line for line in ended.printed.splitlines() if line.startswith("resume: ")]
    assert first == "resume: continuing after step 2 from runs/resumed/checkpoints/step-000002"
    # Whether the kill came before the checkpoint appeared or after it: nothing in between.
    assert second.replace("2", "4") == first.replace("2", "4")
    assert [path.name for path in sorted((bench.at("resumed") / "checkpoints").iterdir())] == [
        "step-000002",
        "step-000004",
    ]
    assert [record["step"] for record in bench.steps("killed")] == [1, 2, 3]
    assert [record["step"] for record in bench.steps("resumed")] == [1, 2, 3, 4]
    same(bench.steps("resumed"), bench.steps("ahead"), tolerance=0.0)
    weights = [bench.at(name) / "model" / "model.safetensors" for name in ("resumed", "ahead")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_finished_run_goes_on_with_more_steps(bench: Bench, later: dict[str, Future[Ended]]) -> None:
    ended = later["continued"].result()
    assert ended.code == 0, ended.printed
    assert "resume: continuing after step 4" in ended.printed
    assert [record["step"] for record in bench.steps("continued")] == [1, 2, 3, 4, 5, 6, 7]


def test_a_killed_search_server_comes_back_and_costs_nothing_but_time(
    bench: Bench, later: dict[str, Future[Ended]]
) -> None:
    ended = later["survived"].result()
    assert ended.code == 0, ended.printed
    log = (bench.at("survived") / "retriever.log").read_text(encoding="utf-8")
    assert log.count("serving on port") == 2
    same(bench.steps("survived"), bench.steps("finished"), tolerance=0.0)


def test_the_same_seed_gives_the_same_run_bit_for_bit(
    bench: Bench, finished: Ended, later: dict[str, Future[Ended]]
) -> None:
    """On one CPU rank, in two processes, of which one even has to wait for its search server."""
    assert finished.code == later["survived"].result().code == 0
    for step in (1, 2, 3, 4):
        ours, theirs = (
            bench.trajectories(name, f"step-{step:06d}.rank0.jsonl") for name in ("finished", "survived")
        )
        assert len(ours) == 4 * 4
        assert list(map(without_times, ours)) == list(map(without_times, theirs))
    weights = [bench.at(name) / "model" / "model.safetensors" for name in ("finished", "survived")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_what_a_hung_search_server_interrupts_is_void_and_never_scored(
    bench: Bench, later: dict[str, Future[Ended]]
) -> None:
    assert later["continued"].result().code == 0
    records = bench.trajectories("continued", "step-000007.rank0.jsonl")
    void = [record for record in records if record["outcome"] == "tool_failed"]
    assert len(void) > len(records) // 2
    for record in void:
        assert record["reward"] is None
        assert record["exact_match"] is None
        assert record["error"].startswith("timeout: ")
    last = bench.steps("continued")[-1]
    assert last["rollout/void"] == len(void) / len(records)
    assert last["retrieval/status/timeout"] == last["retrieval/failed"] == len(void)


def test_too_many_failed_searches_stop_the_run_and_say_why(later: dict[str, Future[Ended]]) -> None:
    ended = later["stopped"].result()
    assert ended.code == 1, ended.printed
    assert ended.seconds < 60
    for line in ("retriever: no search works, waiting", "retriever: given up after", "saved after step"):
        assert line in ended.printed
    message = ended.printed[ended.printed.rindex("trajectories are void") :]
    assert "retrieval.max_failed_fraction=0.1" in message
    assert "what failed: timeout: " in message


def test_a_server_that_returns_with_another_index_stops_the_run(later: dict[str, Future[Ended]]) -> None:
    ended = later["swapped"].result()
    assert ended.code == 1, ended.printed
    message = ended.printed[ended.printed.rindex("trajectories are void") :]
    assert "what failed: error: " in message
    assert "but this run began with index" in message


def test_a_watch_stops_the_run_after_a_checkpoint_from_which_it_goes_on(
    bench: Bench, later: dict[str, Future[tuple[Ended, Ended]]]
) -> None:
    stopped, continued = later["watched"].result()
    assert stopped.code == 1, stopped.printed
    assert "Traceback" not in stopped.printed
    *before, alarm, last = bench.steps("watched")
    assert [record["watch/mismatch"] for record in before] == [0.0] * len(before)
    assert alarm["watch/mismatch"] == 1.0
    assert alarm["tis/ess_ratio"] < 1.0
    checkpoint = f"runs/watched/checkpoints/step-{alarm['step']:06d}"
    for part in ("watch: mismatch: tis/ess_ratio is below its bound", f"saved in {checkpoint}"):
        assert part in stopped.printed
    assert continued.code == 0, continued.printed
    assert f"resume: continuing after step {alarm['step']}" in continued.printed
    assert last["step"] == alarm["step"] + 1
    assert last["rollout/policy_lag"] == 0
    # The rollout that ran ahead when the run was stopped is played again, not left out.
    numbers = {
        int(record["id"].partition("/")[0])
        for step in range(1, last["step"] + 1)
        for record in bench.trajectories("watched", f"step-{step:06d}.rank0.jsonl")
    }
    assert numbers == set(range(4 * last["step"]))
    assert last["watch/mismatch"] == 1.0
    assert "watch: mismatch" not in continued.printed  # it has been said


def test_sinks_hold_what_the_metrics_file_holds_over_a_stop_and_a_resume(
    bench: Bench, later: dict[str, Future[tuple[Ended, Ended]]]
) -> None:
    later["watched"].result()
    folder = bench.at("watched")
    expected = steps(folder)
    scalars, accumulator = event_files(folder)
    assert scalars == [pytest.approx(record, rel=1e-6, abs=1e-9) for record in expected]
    texts = accumulator.Tensors("trajectories/text_summary")
    assert [text.step for text in texts] == [record["step"] for record in expected]
    question = bench.trajectories("watched", "step-000001.rank0.jsonl")[0]["question"]
    assert question in texts[0].tensor_proto.string_val[0].decode()
    first, second = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert first.name == second.name  # one run to Weights & Biases
    history = [*wandb_steps(first), *wandb_steps(second)]
    for record, row in zip(expected, history, strict=True):
        assert row.pop("trajectories")["nrows"] == 16
        assert row == pytest.approx(record, rel=1e-6)


def test_a_preempted_run_saves_and_goes_on_as_if_nothing_had_been(
    bench: Bench, later: dict[str, Future[tuple[Ended, Ended]]]
) -> None:
    stopped, continued = later["preempted"].result()
    assert stopped.code == 75, stopped.printed
    for line in (
        "searchrl: SIGTERM: stopping; from now on Ctrl-C leaves at once",
        "searchrl: stopped by SIGTERM; resume=true continues",
    ):
        assert stopped.printed.count(line) == 1
    assert "Traceback" not in stopped.printed
    assert stopped.server_gone
    assert continued.code == 0, continued.printed
    saved = re.findall(r"saved after step (\d); resume=true continues", stopped.printed)
    assert saved == re.findall(r"resume: continuing after step (\d)", continued.printed)
    same(bench.steps("preempted"), bench.steps("finished"), tolerance=0.0)


def test_ctrl_c_before_training_says_that_nothing_is_lost(later: dict[str, Future[Ended]]) -> None:
    ended = later["interrupted"].result()
    # To a shell both are 130; Python ends by the signal itself if that came within an `exec`, as of imports.
    assert ended.code in (130, -signal.SIGINT), ended.printed
    message = "searchrl: stopped before training began: nothing is lost, the same command starts again"
    assert ended.printed.rstrip().endswith(message)
    assert "Traceback" not in ended.printed
    assert ended.server_gone


def test_two_ranks_do_what_one_does_and_stop_together(
    bench: Bench, later: dict[str, Future[tuple[Ended, Ended]]]
) -> None:
    ended, _ = later["two ranks"].result()
    assert ended.code == 75, ended.printed
    assert ended.server_gone  # and the ranks
    assert "Warning" not in ended.printed
    assert "Traceback" not in ended.printed
    assert ended.printed.count("step 1/50 ") == 1  # only one rank prints
    assert ended.printed.count("searchrl: stopped by SIGUSR1; resume=true continues") == 1
    checkpoint = max((bench.at("two") / "checkpoints").iterdir())
    assert checkpoint.name == f"step-{len(bench.steps('two')):06d}"
    same(bench.steps("two")[:2], bench.steps("finished")[:2], tolerance=1e-4)
    halves = [bench.trajectories("two", f"step-000001.rank{rank}.jsonl") for rank in (0, 1)]
    whole = bench.trajectories("finished", "step-000001.rank0.jsonl")
    assert [streams(record) for half in halves for record in half] == [streams(record) for record in whole]


def test_one_rank_goes_on_where_two_were(bench: Bench, later: dict[str, Future[tuple[Ended, Ended]]]) -> None:
    _, ended = later["two ranks"].result()
    assert ended.code == 0, ended.printed
    done = len(bench.steps("two"))
    folder = f"runs/fewer/checkpoints/step-{done:06d}"
    assert f"resume: continuing after step {done} from {folder}, which 2 ranks saved" in ended.printed
    same(bench.steps("fewer"), bench.steps("finished"), tolerance=1e-3)
    for step in range(done + 1, 5):
        ours, theirs = (
            bench.trajectories(name, f"step-{step:06d}.rank0.jsonl") for name in ("fewer", "finished")
        )
        assert [record["question_id"] for record in ours] == [record["question_id"] for record in theirs]
    names = {path.name for path in (bench.at("fewer") / "trajectories").glob("step-*")}
    assert names == {
        f"step-00000{step}.rank{rank}.jsonl"
        for step in range(1, 5)
        for rank in (range(2) if step <= done else range(1))
    }


def test_the_doctor_finds_nothing_in_the_way_of_these_runs(later: dict[str, Future[Ended]]) -> None:
    ended = later["doctor"].result()
    assert ended.code == 0, ended.printed
    *findings, summary = [line for line in ended.printed.splitlines() if not line.startswith(" ")]
    assert {line.split()[1] for line in findings} == {
        *("configuration", "versions", "packages", "environment", "memory", "disk"),
        *("gpus", "communication", "retriever", "model", "probe"),
    }
    assert summary.endswith(" 0 failed")


def test_custom_functions_adapters_dynamic_sampling_and_an_engine_over_two_ranks_train(
    bench: Bench, later: dict[str, Future[Ended]]
) -> None:
    ended = later["custom"].result()
    assert ended.code == 0, ended.printed
    assert "Warning" not in ended.printed
    steps = bench.steps("custom")
    assert [step["rollout/policy_lag"] for step in steps] == [0, 1]
    assert any(step["update/optimizer_steps"] == 4 for step in steps)
    for step in steps:
        assert step["rollout/groups_sampled"] >= 6  # 1.5 x 4
        assert step["reward/mean"] < step["reward/exact_match"], "searches cost"
        assert step["sync/probe_max_abs_diff"] < 1e-3
        assert [name for name in PROMISED if name not in step] == []
    trained = [step for step in steps if "loss/total" in step]
    assert trained
    assert {"loss/llds", "loss/ref_kl", "loss/entropy", "tis/kept_fraction"} <= trained[-1].keys()
    assert (bench.at("custom") / "model" / "adapter" / "adapter_model.safetensors").exists()
    assert not (bench.at("custom") / "model" / "adapter" / "model.safetensors").exists()
    played = [bench.trajectories("custom", f"step-000001.rank{rank}.jsonl") for rank in (0, 1)]
    assert [len(records) > 0 for records in played] == [True, False]  # the engine's first rank plays


def test_eval_over_two_ranks_gives_the_trajectories_of_the_end_of_training_on_one(
    bench: Bench, later: dict[str, Future[Ended]]
) -> None:
    ended = later["eval"].result()
    assert ended.code == 0, ended.printed
    at_the_end = json.loads((bench.at("finished") / "eval" / "step-000004.json").read_text())
    lines = (bench.at("judged") / "eval" / "results.rank0.jsonl").read_text().splitlines()
    judged = {row["id"]: row["results"] for row in map(json.loads, lines)}
    assert judged == {result["id"]: [result] for result in at_the_end}
    ours, theirs = (
        {record["question_id"]: streams(record) for record in bench.trajectories(name, file)}
        for name, file in (("judged", "eval.rank0.jsonl"), ("finished", "eval-000004.rank0.jsonl"))
    )
    assert ours == theirs
    assert any(query for turns in ours.values() for _, query in turns), "nobody searched"


def test_training_without_retrieval_finds_nothing(bench: Bench, later: dict[str, Future[Ended]]) -> None:
    ended = later["none"].result()
    assert ended.code == 0, ended.printed
    records = bench.trajectories("none", "step-000001.rank0.jsonl")
    searched = [
        turn for record in records for turn in record["turns"] if turn["appended_by"] == "observation"
    ]
    assert searched
    assert all("No documents were found." in turn["appended"] for turn in searched)
    assert not (bench.at("none") / "retriever.log").exists()


def test_a_tool_of_ones_own_answers_what_the_policy_searches(
    bench: Bench, later: dict[str, Future[Ended]]
) -> None:
    ended = later["tool"].result()
    assert ended.code == 0, ended.printed
    (step,) = bench.steps("tool")
    assert step["retrieval/status/ok"] > 0
    records = bench.trajectories("tool", "step-000001.rank0.jsonl")
    read = [turn["appended"] for record in records for turn in record["turns"] if turn["query"] is not None]
    assert read
    assert all("\nDoc 1(Title: " in text for text in read if text)
    assert not (bench.at("tool") / "retriever.log").exists()


def test_no_key_is_written_or_printed(bench: Bench, later: dict[str, Future[Any]]) -> None:
    """Not even the token that is sent to servers elsewhere, in the run whose server was replaced."""
    results = [job.result() for job in later.values()]
    ended = [one for result in results for one in (result if isinstance(result, tuple) else (result,))]
    found = [(name, "printed") for name, key in KEYS.items() for one in ended if key in one.printed]
    files = [path for path in bench.folder.rglob("*") if path.is_file()]  # linked folders are not entered
    assert {path.name for path in files} >= {"config.yaml", "events.jsonl", "retriever.log", "metrics.jsonl"}
    for path in files:
        content = path.read_bytes()
        found += [(name, str(path)) for name, key in KEYS.items() if key.encode() in content]
    assert found == []
