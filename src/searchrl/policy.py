"""The network that is trained: log-probabilities in place of logits, how it is loaded, low-rank adapters.

With adapters (LoRA, arXiv 2106.09685, equation 3) a linear layer computes x ↦ Wx + alpha/rank · B(Ax); W is
frozen, A [rank, in] and B [out, rank] are trained, and B starts at 0. peft puts them into the Hugging Face
model's own modules: ``model.layers.0.mlp.up_proj.weight`` becomes ``….up_proj.base_layer.weight`` beside
``….up_proj.lora_A.default.weight`` and ``….lora_B.default.weight``. Nobody outside the trainer has to know:
:func:`checkpoint_weights` gives the weights back under their old names, with the adapters merged in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from searchrl.algorithm.logprobs import HeadPositions, chunked_logprobs, head_positions
from searchrl.attention import ALONG_PATHS
from searchrl.batching import MicroBatch, PrefixTree
from searchrl.config import Attention, ConfigError, LoraConfig, ModelConfig
from searchrl.distributed import seed_everything


class PolicyModel(nn.Module):
    """A causal language model that returns log-probabilities of loss tokens instead of logits."""

    def __init__(self, model: nn.Module, *, temperature: float, chunk_size: int) -> None:
        super().__init__()
        self.model: Any = model
        self.temperature = temperature
        self.chunk_size = chunk_size

    @property
    def head(self) -> Any:
        """The language-model head."""
        return self.model.get_output_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        tree: PrefixTree | None,
        predictor: Tensor,
        targets: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of ``targets``.

        Args:
            input_ids: [B, T].
            position_ids: [B, T], restarting at every packed trajectory.
            tree: whose nodes the T tokens of the only row are; None: rows are sequences, padded on the right.
            predictor: [N] flat positions whose hidden state predicts a target.
            targets: [N] token ids.

        Returns:
            fp32 [N], fp32 [N].
        """
        kernels = self.model.config._attn_implementation
        if tree is not None and kernels != ALONG_PATHS:  # which would ignore the paths without a word
            raise ValueError(f"{kernels} attention cannot run a tree; load the network with load_model")
        # base_model is transformers' name for the network without its head; adapters stand inside it.
        paths = {} if tree is None else {"paths": tree.paths, "place": tree.place}
        hidden = self.model.base_model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, **paths
        ).last_hidden_state
        hidden = hidden.flatten(0, 1)[predictor]
        head = self.head
        return chunked_logprobs(
            hidden, head.weight, getattr(head, "bias", None), targets, self.temperature, self.chunk_size
        )


@dataclass(kw_only=True, slots=True)
class TokenOutputs:
    """The model's view of a micro-batch's N loss tokens."""

    logprobs: Tensor
    """fp32 [N] with gradient."""
    entropy: Tensor
    """fp32 [N] in nats; ``chunked_logprobs`` says whether with gradient."""
    positions: HeadPositions
    """Where they stand in the flattened micro-batch."""
    batch: MicroBatch


class ReferencePolicy(Protocol):
    """What KL penalties compare the trained policy with: the initial one."""

    def logprobs(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Log-probabilities of each micro-batch's loss tokens, fp32 [N] each. A collective."""


def runs_on_trees(model: ModelConfig) -> bool:
    """FlashAttention runs the packed row itself, whose position_ids delimit sequences."""
    return model.attention is Attention.sdpa


def token_outputs(module: Any, batch: MicroBatch, use_tree: bool = True) -> TokenOutputs:
    """Run ``module``, a ``PolicyModel`` or what wraps one, on the micro-batch.

    Args:
        module: returns log-probabilities and entropies.
        batch: on the module's device.
        use_tree: packed rows run as their trees.

    Raises:
        ValueError: a row of several trajectories has no tree, though it should run as one.
    """
    if use_tree and batch.tree is None and any(len(row) > 1 for row in batch.sample_ids):
        raise ValueError("a row of several trajectories needs its tree, or they would attend to one another")
    positions = head_positions(batch.loss_mask, batch.segment_ids)
    targets = batch.input_ids.flatten()[positions.token]
    if batch.tree is None or not use_tree:
        logprobs, entropy = module(batch.input_ids, batch.position_ids, None, positions.predictor, targets)
    else:
        tree = batch.tree
        logprobs, entropy = module(
            tree.input_ids, tree.position_ids, tree, tree.node_of[positions.predictor], targets
        )
    return TokenOutputs(logprobs=logprobs, entropy=entropy, positions=positions, batch=batch)


def load_model(path: Path | str, config: ModelConfig, *, zero3: dict[str, Any] | None = None) -> Any:
    """Load the Hugging Face model as it was saved, without adapters.

    Args:
        path: local folder or hub name.
        config: number format and attention kernels.
        zero3: DeepSpeed's configuration under ZeRO-3: parameters are then split as they are read, and never
            whole on one rank.
    """
    from transformers import AutoModelForCausalLM
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    keep_alive = HfDeepSpeedConfig(zero3) if zero3 is not None else None  # found through a weak reference
    kernels = ALONG_PATHS if runs_on_trees(config) else str(config.attention)
    network = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=getattr(torch, config.dtype),
        attn_implementation=kernels,
        use_safetensors=True,
        trust_remote_code=False,
    )
    del keep_alive
    return network


def add_adapters(network: Any, lora: LoraConfig, *, seed: int) -> None:
    """Freeze the network and put trainable adapters into its linear layers, in its own number format.

    The same seed gives the same adapters at every ZeRO stage and on every rank.

    Raises:
        ConfigError: ``model.lora.targets`` names something that is no linear layer of this network, or the
            head, whose weight the loss uses without running the head's module.
    """
    import peft

    head = network.get_output_embeddings()
    linear = {
        name.rpartition(".")[2]
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    unknown = sorted(set(lora.targets) - linear)
    if unknown:
        raise ConfigError(
            f"model.lora.targets names {', '.join(unknown)}, which this model cannot adapt; "
            f"choose from {', '.join(sorted(linear))}, or leave it empty for all of them"
        )
    seed_everything(seed)  # loading draws random numbers too, other ones under ZeRO-3
    network.add_adapter(
        peft.LoraConfig(
            task_type=peft.TaskType.CAUSAL_LM,
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft only divides it by the rank
            target_modules=sorted(lora.targets or linear),
        )
    )


def adapter_parameters(network: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The adapters' parameters by their names in ``network``; none if it has no adapters."""
    return [(n, p) for n, p in network.named_parameters() if ".lora_A." in n or ".lora_B." in n]


@contextmanager
def adapters_off(network: Any) -> Iterator[None]:
    """Within, the network computes what it did before adapters were added."""
    network.disable_adapters()
    try:
        yield
    finally:
        network.enable_adapters()


@dataclass(kw_only=True, slots=True, frozen=True)
class Weight:
    """One tensor of a checkpoint and the parameters that it comes from, which ZeRO-3 has to gather."""

    name: str
    """As in a checkpoint of the model without adapters."""
    base: nn.Parameter
    adapter: tuple[nn.Parameter, nn.Parameter] | None
    """A [rank, in] and B [out, rank]."""
    scale: float
    """alpha / rank."""

    @property
    def parameters(self) -> list[Any]:
        """All that ``merged`` reads."""
        return [self.base, *(self.adapter or ())]

    @torch.no_grad()
    def merged(self) -> Tensor:
        """W + alpha/rank · BA, summed in fp32 and rounded once to W's dtype; without adapter W itself."""
        if self.adapter is None:
            return self.base.data
        a, b = self.adapter
        total = torch.addmm(self.base.float(), b.float(), a.float(), alpha=self.scale)
        return total.to(self.base.dtype)


def checkpoint_weights(network: nn.Module, lora: LoraConfig) -> list[Weight]:
    """What a checkpoint of the network holds, in module order; a tied head appears once."""
    adapters = dict(adapter_parameters(network))
    weights = []
    for name, parameter in network.named_parameters():
        if name not in adapters:
            layer, _, leaf = name.rpartition(".base_layer.")
            pair = (f"{layer}.lora_A.default.weight", f"{layer}.lora_B.default.weight")
            weights.append(
                Weight(
                    name=name.replace(".base_layer.", "."),
                    base=parameter,
                    adapter=(adapters[pair[0]], adapters[pair[1]]) if layer and leaf == "weight" else None,
                    scale=lora.alpha / lora.rank if lora.rank else 0.0,
                )
            )
    return weights


def weight_buckets(weights: Sequence[Weight], max_elements: int) -> Iterator[list[Weight]]:
    """Consecutive weights of together at most ``max_elements`` parameters, at least one weight a bucket.

    Args:
        weights: of a network that ZeRO-3 has partitioned.
        max_elements: counts whole parameters.
    """
    bucket: list[Weight] = []
    size = 0
    for weight in weights:
        elements = sum(parameter.ds_numel for parameter in weight.parameters)
        if bucket and size + elements > max_elements:
            yield bucket
            bucket, size = [], 0
        bucket.append(weight)
        size += elements
    if bucket:
        yield bucket


def save_adapters(network: Any, folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write adapters in peft's own format, for ``PeftModel.from_pretrained(base, folder)``.

    Args:
        network: has the adapters.
        folder: is made if need be.
        tensors: whole, by the names of ``adapter_parameters``.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    named = {f"base_model.model.{n.replace('.default.', '.')}": t.contiguous() for n, t in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    network.peft_config["default"].save_pretrained(folder)
