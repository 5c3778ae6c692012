"""The same trajectories give the same gradient, however they are cut; and it is the gradient of the book."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from integration.launch import run_checks

pytestmark = pytest.mark.integration

CUTS = {
    "tied/twelve": [f"zero{stage}/{rows}" for stage in range(4) for rows in ("tiny", "all")],
    "tied/one": [f"zero{stage}/all" for stage in range(4)],  # with two ranks, one of them has nothing to do
    "tied/five": ["zero2/tiny", "zero3/tiny"],  # with two ranks, one has more micro-batches
    "untied/twelve": ["zero0/tiny", "zero2/tiny", "zero3/tiny"],
}


@dataclass(frozen=True)
class Measured:
    """What ``gradient_checks`` wrote."""

    gradients: dict[str, dict[str, torch.Tensor]]
    norms: dict[str, float]
    losses: dict[str, float]
    printed: str


def measure(out: Path, models: tuple[Path, Path], ranks: int) -> Measured:
    checks = run_checks("gradient_checks", out, *models, ranks=ranks)
    return Measured(
        torch.load(out / "gradients.pt"), checks.results["norms"], checks.results["losses"], checks.printed
    )


@pytest.fixture(scope="module")
def measured(
    tiny_model: Path, tiny_model_untied: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Measured]:
    """By number of ranks."""
    models = (tiny_model, tiny_model_untied)
    with ThreadPoolExecutor() as pool:
        running = {n: pool.submit(measure, tmp_path_factory.mktemp("ranks"), models, n) for n in (1, 2)}
        return {ranks: future.result() for ranks, future in running.items()}


def relative_error(gradient: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest over the parameters: a wrong small one must not hide behind the others."""
    assert gradient.keys() == expected.keys()
    return max(float((gradient[n] - expected[n]).norm() / expected[n].norm()) for n in expected)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("batch", CUTS)
def test_every_cut_gives_the_gradient_of_plain_autograd(
    measured: dict[int, Measured], batch: str, ranks: int
) -> None:
    expected = measured[1].gradients[batch]
    errors = {
        cut: relative_error(measured[ranks].gradients[f"{batch}/{cut}"], expected) for cut in CUTS[batch]
    }
    assert max(errors.values()) <= 1e-5, errors


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("batch", CUTS)
def test_norm_and_mean_loss_agree(measured: dict[int, Measured], batch: str, ranks: int) -> None:
    by_the_book, found = measured[1], measured[ranks]
    for cut in CUTS[batch]:
        assert found.norms[f"{batch}/{cut}"] == pytest.approx(by_the_book.norms[batch], rel=1e-5), cut
        assert found.losses[f"{batch}/{cut}"] == pytest.approx(by_the_book.losses[batch], rel=1e-4), cut


def test_the_batches_differ_so_that_agreement_means_something(measured: dict[int, Measured]) -> None:
    gradients = measured[1].gradients
    assert relative_error(gradients["tied/one"], gradients["tied/twelve"]) > 0.1
    assert relative_error(gradients["tied/five"], gradients["tied/twelve"]) > 0.1


@pytest.mark.parametrize("ranks", [1, 2])
def test_nothing_is_printed(measured: dict[int, Measured], ranks: int) -> None:
    assert measured[ranks].printed == ""
