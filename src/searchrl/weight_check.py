"""Does a loaded model hold every tensor of a checkpoint, bit by bit, whatever it computes with them?

An engine keeps weights in its own form: fused, padded, split over ranks. Its loaders know that form. So every
tensor is loaded once more, into a blank in the place of its parameter, and whatever the loader writes must be
what the parameter holds. On a CPU vLLM multiplies by packed copies of matrices that nothing else can read;
multiplied by the identity, whose products and sums are exact, they show what they hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Loader = Callable[..., object]
"""``loader(parameter, tensor, *shard)`` writes a checkpoint's tensor into its place in a parameter."""


def differing(
    model: Any,
    weights: Iterable[tuple[str, Tensor]],
    *,
    loader_of: Callable[[nn.Parameter], Loader],
    as_loaded: Callable[[nn.Module], nn.Parameter],
) -> list[str]:
    """Names of what differs, with the reason; empty if nothing does. The model stays as it is.

    Args:
        model: vLLM's; ``load_weights`` gives every tensor to the loader of its parameter.
        weights: all of the checkpoint, by name.
        loader_of: a parameter's own loader.
        as_loaded: a linear layer's weight in the form in which it is loaded, for layers that have packed it.
    """
    with _unpacked(model, as_loaded) as stale:
        check = _Check(dict(model.named_parameters()))
        with check.listening(loader_of):
            model.load_weights(check.passing(weights))
    return [*check.wrong, *check.unreached(), *stale]


@dataclass(slots=True)
class _Check:
    """Stands in for the parameters' loaders."""

    parameters: Mapping[str, nn.Parameter]
    wrong: dict[str, None] = field(default_factory=dict)
    """Names, each once, in the order of the checkpoint."""
    reached: dict[str, int] = field(default_factory=dict)
    """Elements of each parameter that tensors of the checkpoint belong to."""
    current: str = ""

    def passing(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same, remembering whose turn it is."""
        for self.current, tensor in weights:
            yield self.current, tensor

    @contextmanager
    def listening(self, loader_of: Callable[[nn.Parameter], Loader]) -> Iterator[None]:
        """Within, tensors are compared instead of loaded."""
        parameter: Any  # vLLM adds attributes
        loaders = {name: loader_of(parameter) for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            parameter.weight_loader = self._comparing(name, loaders[name])
        try:
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.weight_loader = loaders[name]

    def _comparing(self, name: str, loader: Loader) -> Loader:
        def compare(parameter: nn.Parameter, tensor: Tensor, *shard: Any, **named: Any) -> None:
            held = parameter.data
            parameter.data = torch.full_like(held, float("nan"))
            try:
                loader(parameter, tensor, *shard, **named)
                expected = parameter.data
            finally:
                parameter.data = held
            written = ~expected.isnan()  # a NaN in the tensor counts as a place that nothing was written to
            self.reached[name] = self.reached.get(name, 0) + int(written.sum())
            if bool(((expected != held) & written).any()):
                self.wrong[self.current] = None

        return compare

    def unreached(self) -> Iterator[str]:
        """Parameters of which something is in no tensor of the checkpoint."""
        for name, parameter in self.parameters.items():
            missing = parameter.numel() - self.reached.get(name, 0)
            if missing:
                yield f"{name} of the engine ({missing} elements that no finite number was sent for)"


@contextmanager
def _unpacked(model: nn.Module, as_loaded: Callable[[nn.Module], nn.Parameter]) -> Iterator[list[str]]:
    """Gives layers that have nothing but a packed weight a readable one for a while.

    Yields the names of packed copies that differ from the weight that is still beside them.
    """
    stale: list[str] = []
    replaced: list[tuple[nn.Module, nn.Parameter]] = []
    module: Any
    for name, module in model.named_modules():
        if not hasattr(module, "cpu_linear"):  # what vLLM's CPU build multiplies with in place of the weight
            continue
        weight = module.weight if module.weight.numel() else as_loaded(module)
        identity = torch.eye(weight.shape[1], dtype=weight.dtype)
        packed = module.cpu_linear(identity, module.weight, None).T
        if weight is module.weight:
            if not torch.equal(packed, weight):
                stale.append(f"the packed copy of {name}.weight")
        else:
            weight.data.copy_(packed)
            replaced.append((module, module.weight))
            module.weight = weight
    try:
        yield stale
    finally:
        for module, weight in replaced:
            module.weight = weight
