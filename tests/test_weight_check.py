"""Every tensor of a checkpoint is found again in a model that fuses, pads and packs; faults are named.

The model is a small one that keeps and loads its weights as vLLM's do; the real ones are in
``tests/integration/test_weight_sync.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from searchrl.weight_check import differing

ROWS, PADDED, WIDTH = 5, 8, 4
PLACES = {"q": 0, "k": 3, "v": 4}
"""First row of each part of the fused matrix."""
Weights = dict[str, Tensor]


class Packed(nn.Module):
    """A linear layer that multiplies by a copy, and may have nothing but that."""

    def __init__(self, weight: nn.Parameter, *, keeps: bool) -> None:
        super().__init__()
        self.weight, self.keeps = weight, keeps

    def pack(self) -> None:
        """Copy what the weight is now."""
        copy, self.forms = self.weight.detach().clone(), [self.weight]  # in a list: no parameter of the model
        self.cpu_linear = lambda x, weight, bias: x @ copy.T
        if not self.keeps:
            self.weight = nn.Parameter(torch.empty(0), requires_grad=False)


class Model(nn.Module):
    """An embedding with padding, tied to its head; a fused matrix; a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(PADDED, WIDTH), requires_grad=False)
        self.fused = Packed(nn.Parameter(torch.zeros(6, WIDTH), requires_grad=False), keeps=False)
        self.norm = nn.Parameter(torch.zeros(WIDTH), requires_grad=False)
        self.head = Packed(self.embedding, keeps=True)
        self.embedding.weight_loader = load_padded  # type: ignore[attr-defined]
        self.fused.weight.weight_loader = load_part  # type: ignore[attr-defined]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """By the names of the checkpoint."""
        for name, tensor in weights:
            parameter: Any = {"embedding": self.embedding, "norm": self.norm}.get(name, self.fused.weight)
            loader_of(parameter)(parameter, tensor, *([name] if name in PLACES else []))


def load_padded(parameter: Any, tensor: Tensor) -> None:
    parameter.data[: len(tensor)].copy_(tensor)
    parameter.data[len(tensor) :].zero_()


def load_part(parameter: Any, tensor: Tensor, part: str) -> None:
    parameter.data[PLACES[part] : PLACES[part] + len(tensor)].copy_(tensor)


def loader_of(parameter: Any) -> Any:
    return parameter.weight_loader if hasattr(parameter, "weight_loader") else lambda p, t: p.data.copy_(t)


def as_loaded(layer: Any) -> nn.Parameter:
    blank = nn.Parameter(torch.empty_like(layer.forms[0]), requires_grad=False)
    blank.weight_loader = loader_of(layer.forms[0])  # type: ignore[attr-defined]
    return blank


def checkpoint() -> Weights:
    torch.manual_seed(0)
    shapes = {"embedding": (ROWS, WIDTH), "q": (3, WIDTH), "k": (1, WIDTH), "v": (2, WIDTH), "norm": (WIDTH,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def loaded(weights: Weights) -> Model:
    model = Model()
    model.load_weights(weights.items())
    for layer in (model.fused, model.head):
        layer.pack()
    return model


def check(model: Model, weights: Weights) -> list[str]:
    return differing(model, weights.items(), loader_of=loader_of, as_loaded=as_loaded)


def last_bit(tensor: Tensor) -> Tensor:
    """Flipped in the last element."""
    moved = tensor.clone()
    moved.view(-1)[-1:].view(torch.int32).bitwise_xor_(1)
    return moved


def test_a_whole_model_has_no_differences_and_stays_as_it_is() -> None:
    weights = checkpoint()
    model = loaded(weights)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for _ in range(2):
        assert check(model, weights) == []
    assert model.fused.weight.numel() == 0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert loader_of(model.embedding) is load_padded


@pytest.mark.parametrize("name", checkpoint())
def test_the_last_bit_of_any_tensor_is_seen_and_named(name: str) -> None:
    weights = checkpoint()
    damaged = loaded({**weights, name: last_bit(weights[name])})
    # The head's copy is of the same damaged embedding: it is not stale.
    assert check(damaged, weights) == [name]


def test_a_value_where_padding_should_be_is_seen() -> None:
    weights = checkpoint()
    model = loaded(weights)
    model.embedding.data[-1, -1] = 1.0
    model.head.pack()
    assert check(model, weights) == ["embedding"]


def test_a_copy_that_was_not_renewed_is_named() -> None:
    old = checkpoint()
    model = loaded(old)
    new = {**old, "embedding": last_bit(old["embedding"])}
    load_padded(model.embedding, new["embedding"])
    assert check(model, new) == ["the packed copy of head.weight"]


def test_what_no_tensor_reaches_is_named() -> None:
    weights = checkpoint()
    model = loaded(weights)
    del weights["k"], weights["norm"]
    assert check(model, weights) == [
        "norm of the engine (4 elements that no finite number was sent for)",
        "fused.weight of the engine (4 elements that no finite number was sent for)",
    ]


def test_a_number_that_is_none_is_seen_even_if_both_have_it() -> None:
    weights = checkpoint()
    weights["norm"][1] = float("nan")
    assert check(loaded(weights), weights) == [
        "norm of the engine (1 elements that no finite number was sent for)"
    ]
