"""What a guard stops is written down, read back and run again: real weights, one of which is not a number."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from integration.scripts.common import grouped_samples
from searchrl.algorithm.losses import LossInputs, LossOutputs
from searchrl.batching import MicroBatch, make_batches
from searchrl.cli import main
from searchrl.compose import compose_config
from searchrl.config import Config
from searchrl.distributed import World
from searchrl.dumps import DumpError, dumped, read_dump
from searchrl.guards import Fault, NonFiniteStepError, batch_fault, logprob_fault, meet
from searchrl.replay import Figures, replay
from searchrl.trajectory import Sample

ALONE = World(rank=0, size=1, local_rank=0, device="cpu")
SAMPLES = grouped_samples(3, groups=2, members=3)
SETTINGS = ("+experiment=smoke", "batching.max_tokens=4096")


def batches(samples: list[Sample] = SAMPLES) -> list[MicroBatch]:
    return make_batches(samples, Config(), 4096)


def with_logprob(sample: Sample, value: float) -> Sample:
    """The engine's log-probability of the first sampled token is ``value``."""
    first, *rest = sample.trajectory.turns
    broken = replace(first, logprobs=[value, *first.logprobs[1:]])
    return replace(sample, trajectory=replace(sample.trajectory, turns=[broken, *rest]))


def swapped(number: int, change: Callable[[Sample], Sample]) -> list[Sample]:
    return [change(sample) if index == number else sample for index, sample in enumerate(SAMPLES)]


def copy(model: Path, to: Path) -> dict[str, torch.Tensor]:
    """The model in another folder; returns its weights, to be changed and written there."""
    to.mkdir()
    for file in model.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return load_file(to / "model.safetensors")


def stop(
    run_dir: Path, model: Path, samples: list[Sample], fault: Fault, *settings: str, **known: list[float]
) -> Path:
    """Write a dump as a run does; the folder that the error names."""

    def export(folder: Path) -> None:
        copy(model, folder)

    values = {name: {sample.id: numbers for sample in samples} for name, numbers in known.items()}
    _, resolved = compose_config([*SETTINGS, *settings])
    with (
        pytest.raises(NonFiniteStepError) as stopped,
        dumped(run_dir, step=7, resolved=resolved, world=ALONE, reference=model, export=export),
    ):
        meet(fault, samples, lambda _: values, 5.0)
    assert fault.message in str(stopped.value)
    folder = Path(str(stopped.value).rpartition("searchrl replay ")[2])
    assert folder == run_dir / "dumps" / "step-000007.rank0"
    return folder


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_faults_are_found_and_name_their_trajectories(bad: float) -> None:
    assert batch_fault(batches()) is None
    fault = batch_fault(batches(swapped(4, lambda sample: with_logprob(sample, bad))))
    assert fault is not None
    assert "the engine's log-probabilities are NaN or infinite at 1 of" in fault.message
    assert fault.message.endswith("in trajectories 1/1")
    assert "1/1" in fault.ids
    fault = batch_fault(batches(swapped(2, lambda sample: replace(sample, advantage=bad))))
    assert fault is not None
    assert fault.message == "the advantage is NaN or infinite in trajectories 0/2"
    row = batches()
    values = [torch.zeros(int(batch.loss_mask.sum())) for batch in row]
    assert logprob_fault("reference", row, values) is None
    values[0][-1] = bad
    fault = logprob_fault("reference", row, values)
    assert fault is not None
    assert fault.message.endswith(f"in trajectories {row[0].trajectory_ids[-1]}")
    assert fault.source == "reference"


def test_nothing_to_say_goes_on() -> None:
    meet(None, SAMPLES, lambda _: {})


def test_long_lists_of_trajectories_are_cut() -> None:
    ids = [f"0/{number}" for number in range(40)]
    message = str(NonFiniteStepError([None, Fault("bad", ids)], None))
    assert message.startswith("stopped before the optimizer's step: rank 1: bad (micro-batch: 0/0, 0/1, ")
    assert message.endswith("0/11 and 28 more)")


def test_a_dump_holds_the_samples_bit_by_bit(tiny_model: Path, tmp_path: Path) -> None:
    samples = swapped(1, lambda sample: with_logprob(sample, math.nan))[:3]
    fault = Fault("broken", [sample.id for sample in samples], "samples")
    folder = stop(tmp_path, tiny_model, samples, fault, old_logprobs=[0.1, -math.inf])
    dump = read_dump(folder)
    assert dump.evidence.fault == fault
    assert dump.step == 7
    assert dump.evidence.denominator == 5.0
    assert repr(dump.evidence.samples) == repr(samples)  # NaN is unequal to itself
    assert dump.evidence.known == {"old_logprobs": {sample.id: [0.1, -math.inf] for sample in samples}}
    assert dump.cfg == compose_config(SETTINGS)[0]
    record = json.loads((folder / "dump.json").read_text(encoding="utf-8"))
    assert record["policy_version"] == 6
    assert [entry["loss_mask"] for entry in record["samples"]] == [s.trajectory.loss_mask for s in samples]
    assert (dump.model / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("content", "message"), [(None, "holds no dump"), ("{", "holds no dump"), ("{}", "format None")]
)
def test_what_is_no_dump_is_refused(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "dump.json").write_text(content, encoding="utf-8")
    with pytest.raises(DumpError, match=message):
        read_dump(tmp_path)


def test_a_disk_that_is_full_does_not_hide_the_stop(tmp_path: Path) -> None:
    def export(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with (
        pytest.raises(NonFiniteStepError, match=r"broken (.|\n)*could not be written down: .*No space"),
        dumped(tmp_path, step=1, resolved={}, world=ALONE, reference="r", export=export),
    ):
        meet(Fault("broken", []), [], lambda _: {})


def steep(inputs: LossInputs) -> LossOutputs:
    """A custom loss that is 0, with a gradient that is none: the slope of a root at 0."""
    return LossOutputs(token_losses=(inputs.logprobs - inputs.old_logprobs).abs().sqrt(), metrics={})


def words(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed, however its lines were broken."""
    return " ".join(capsys.readouterr().out.split())


def by_id(figures: list[Figures]) -> dict[str, Figures]:
    return {each.id: each for each in figures}


def test_replay_finds_the_weight(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = copy(tiny_model, tmp_path / "broken")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = math.nan
    save_file(weights, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    fault = Fault("the loss is NaN", [sample.id for sample in SAMPLES])
    folder = stop(tmp_path, tmp_path / "broken", SAMPLES, fault)
    figures = by_id(replay(folder, model=None, device="cpu"))
    printed = words(capsys)
    assert "that of model.layers.1.mlp.up_proj (Linear)" in printed
    assert "its input is finite, and 1 of its own weights are not" in printed
    assert "backward: not reached" in printed
    assert figures.keys() == {sample.id for sample in SAMPLES}
    assert all("the trainer's log-probabilities are NaN" in each.fault for each in figures.values())
    healthy = by_id(replay(folder, model=str(tiny_model), device="cpu"))  # other weights, nothing broken
    printed = words(capsys)
    assert "forward: every output is finite" in printed
    assert "backward: every gradient is finite" in printed
    assert "together in one micro-batch: finite as well" in printed
    assert all(not each.fault and each.gradient > 0 for each in healthy.values())


def test_replay_finds_the_sample(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = swapped(1, lambda sample: with_logprob(sample, math.nan))
    samples[4] = replace(samples[4], advantage=math.inf)
    fault = batch_fault(batches(samples))
    assert fault is not None
    figures = by_id(replay(stop(tmp_path, tiny_model, samples, fault), model=None, device="cpu"))
    assert "the engine's log-probabilities" in figures["0/1"].fault
    assert "the loss is NaN or infinite" in figures["1/1"].fault
    assert [name for name, each in figures.items() if each.fault] == ["0/1", "1/1"]
    printed = words(capsys)
    assert "forward: every output is finite" in printed
    assert "backward: every gradient is finite" in printed


def test_replay_runs_the_reference_where_it_was_that(
    tiny_model: Path, tiny_model_untied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fault = Fault("the reference's", [sample.id for sample in SAMPLES], "reference")
    folder = stop(tmp_path, tiny_model, SAMPLES, fault)
    file = folder / "dump.json"
    record = json.loads(file.read_text(encoding="utf-8")) | {"reference": str(tiny_model_untied)}
    file.write_text(json.dumps(record), encoding="utf-8")
    main(["replay", str(folder)])
    assert f"weights: {tiny_model_untied}" in words(capsys)


def test_replay_finds_a_gradient_behind_a_finite_loss(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fault = Fault("the gradient's norm is nan", [sample.id for sample in SAMPLES], "gradient")
    custom = ("loss.kind=custom", f"loss.import_path={__name__}:steep")
    figures = replay(stop(tmp_path, tiny_model, SAMPLES, fault, *custom), model=None, device="cpu")
    assert all(each.loss == 0 and math.isnan(each.gradient) for each in figures)
    assert "the gradient's norm is nan, though the loss is finite" in figures[0].fault
    printed = words(capsys)
    assert "forward: every output is finite" in printed
    assert "backward: the first gradient that is not finite, from the loss downwards, is that of" in printed


def test_replay_recomputes_the_loss_of_the_step(tiny_model: Path, tmp_path: Path) -> None:
    """Against plain sums: on-policy the share of a trajectory is -advantage x its weights / denominator."""
    ids = [sample.id for sample in SAMPLES]
    folder = stop(tmp_path, tiny_model, SAMPLES, Fault("x", ids, "gradient"))
    figures = replay(folder, model=None, device="cpu")
    for each, sample in zip(figures, SAMPLES, strict=True):
        logprobs = [value for turn in sample.trajectory.turns for value in turn.logprobs]
        assert each.engine == pytest.approx(sum(logprobs) / len(logprobs), rel=1e-5)
        assert each.tokens == len(logprobs)
        assert each.max_diff < 10
        assert each.here == pytest.approx(-5.7, abs=1.0)  # about 1 / vocabulary
    again = replay(folder, model=None, device="cpu")
    assert [each.loss for each in again] == [each.loss for each in figures]
