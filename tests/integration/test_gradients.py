"""The same trajectories give the same gradient, however they are cut; and it is the gradient of the book."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from integration.launch import Checks

pytestmark = pytest.mark.integration

STAGES = range(4)
CUTS = ["1", "4/packed", "4/padded", "all/packed", "all/padded"]
GLOBAL_CUTS = ["1", "4/padded", "all/packed"]
CASES = {
    "plain": [f"plain/zero{stage}/{cut}" for stage in STAGES for cut in CUTS],
    "global": [f"global/zero{stage}/{cut}" for stage in STAGES for cut in GLOBAL_CUTS],
    "untied": [f"untied/zero{stage}" for stage in STAGES],
    "one": [f"one/zero{stage}" for stage in STAGES],  # with two ranks, one of them has nothing to do
    "five": [f"five/zero{stage}" for stage in STAGES],  # with two ranks, one has more micro-batches
}


@dataclass(frozen=True)
class Measured:
    """What ``gradient_checks`` wrote."""

    gradients: dict[str, dict[str, torch.Tensor]]
    norms: dict[str, float]
    losses: dict[str, float]
    printed: str


@pytest.fixture(scope="module")
def measured(update_checks: dict[int, tuple[Path, Checks]]) -> dict[int, Measured]:
    """By number of ranks."""
    return {
        ranks: Measured(
            torch.load(out / "gradients.pt"), **checks.results["gradients"], printed=checks.printed
        )
        for ranks, (out, checks) in update_checks.items()
    }


def relative_error(gradient: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest over the parameters: a wrong small one must not hide behind the others."""
    assert gradient.keys() == expected.keys()
    return max(float((gradient[n] - expected[n]).norm() / expected[n].norm()) for n in expected)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("batch", CASES)
def test_every_cut_gives_the_gradient_of_plain_autograd(
    measured: dict[int, Measured], batch: str, ranks: int
) -> None:
    expected = measured[1].gradients[batch]
    errors = {cut: relative_error(measured[ranks].gradients[cut], expected) for cut in CASES[batch]}
    assert max(errors.values()) <= 1e-5, errors


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("batch", CASES)
def test_norm_and_loss_agree(measured: dict[int, Measured], batch: str, ranks: int) -> None:
    by_the_book, found = measured[1], measured[ranks]
    for cut in CASES[batch]:
        assert found.norms[cut] == pytest.approx(by_the_book.norms[batch], rel=1e-5), cut
        assert found.losses[cut] == pytest.approx(by_the_book.losses[batch], rel=1e-4, abs=1e-6), cut


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_several_optimizer_steps_end_alike(measured: dict[int, Measured], stage: int, ranks: int) -> None:
    """The fourth gradient follows three steps of AdamW, which magnify rounding where a gradient is near 0."""
    expected = measured[1].gradients["steps/zero0"]
    assert relative_error(measured[ranks].gradients[f"steps/zero{stage}"], expected) <= 1e-3
    assert relative_error(measured[1].gradients["steps/frozen"], expected) > 0.03, "the steps do matter"


def test_the_batches_differ_so_that_agreement_means_something(measured: dict[int, Measured]) -> None:
    gradients = measured[1].gradients
    for other in ("one", "five", "global"):
        assert relative_error(gradients[other], gradients["plain"]) > 0.1


@pytest.mark.parametrize("ranks", [1, 2])
def test_nothing_is_printed(measured: dict[int, Measured], ranks: int) -> None:
    lines = measured[ranks].printed.splitlines()
    assert [
        line for line in lines if "OVERFLOW" not in line
    ] == []  # DeepSpeed's word on what the guards stop


RETRIED = [f"{where}/zero{stage}" for stage in (0, 1, 2) for where in ("forward", "backward")]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_that_memory_ran_out_in_is_made_with_less(
    update_checks: dict[int, tuple[Path, Checks]], ranks: int
) -> None:
    """Weights and metrics are those of a run that had the smaller token budget from the start."""
    found = update_checks[ranks][1].results["oom"]
    assert set(found) == set(RETRIED if ranks == 1 else RETRIED[:-1])
    for name, case in found.items():
        assert case["retries"] >= 1, name
        assert case["budget"] < 1_000, name
        assert case["weights"] <= 1e-5, (name, case)
        assert case["metrics"] <= 1e-5, (name, case)
