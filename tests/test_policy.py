"""Adapters: what is trained, what a checkpoint of it holds, and what the rest of the world sees of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from searchrl.attention import ALONG_PATHS
from searchrl.config import ConfigError, LoraConfig, ModelConfig
from searchrl.policy import (
    PolicyModel,
    adapter_parameters,
    adapters_off,
    add_adapters,
    checkpoint_weights,
    load_model,
    save_adapters,
)

LINEAR = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
Q_PROJ = "model.layers.0.self_attn.q_proj"


def plain(*, tied: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    """One layer with weights large enough that all of them matter."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=tied,
    )
    network: Any = LlamaForCausalLM(config)
    return network.to(dtype)


def adapted(lora: LoraConfig, *, train: bool = True, tied: bool = True, **options: Any) -> Any:
    """The same with adapters; ``train`` moves B away from 0, where adapters do nothing."""
    network = plain(tied=tied, **options)
    add_adapters(network, lora, seed=1)
    if train:
        torch.manual_seed(2)
        for name, parameter in adapter_parameters(network):
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return network


def logprobs(network: Any) -> Tensor:
    """What the policy says of eight tokens."""
    policy = PolicyModel(network, temperature=0.7, chunk_size=3)
    ids = torch.arange(9).unsqueeze(0) * 7 % 64
    values, _ = policy(ids, torch.arange(9).unsqueeze(0), None, torch.arange(8), ids[0, 1:])
    assert isinstance(values, Tensor)
    return values


@pytest.mark.parametrize(
    ("targets", "modules"), [((), LINEAR), (("v_proj", "q_proj"), ["q_proj", "v_proj"]), (("up_proj",),) * 2]
)
def test_only_adapters_of_the_targets_are_trained(targets: tuple[str, ...], modules: list[str]) -> None:
    network = adapted(LoraConfig(rank=4, targets=targets))
    trained = {name: tuple(p.shape) for name, p in network.named_parameters() if p.requires_grad}
    assert trained == {name: tuple(p.shape) for name, p in adapter_parameters(network)}
    assert sorted({name.split(".")[-4] for name in trained}) == sorted(modules)
    assert len(trained) == 2 * len(modules)
    if "v_proj" in modules:  # 32 inputs, two heads of 8 outputs
        stem = "model.layers.0.self_attn.v_proj"
        assert trained[f"{stem}.lora_A.default.weight"] == (4, 32)
        assert trained[f"{stem}.lora_B.default.weight"] == (16, 4)


@pytest.mark.parametrize("unknown", ["q_prj", "lm_head", "embed_tokens", "self_attn"])
def test_a_target_that_cannot_be_adapted_is_refused(unknown: str) -> None:
    with pytest.raises(ConfigError, match=f"model.lora.targets names {unknown}, .* {', '.join(LINEAR)}"):
        add_adapters(plain(tied=False), LoraConfig(rank=4, targets=("q_proj", unknown)), seed=0)


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_has_the_names_and_shapes_of_the_plain_model(tied: bool) -> None:
    lora = LoraConfig(rank=4)
    weights = {w.name: w.merged().shape for w in checkpoint_weights(adapted(lora, tied=tied), lora)}
    assert list(weights.items()) == [(name, p.shape) for name, p in plain(tied=tied).named_parameters()]


def test_a_model_without_adapters_yields_its_own_tensors() -> None:
    network = plain()
    weights = checkpoint_weights(network, LoraConfig())
    for weight, (name, parameter) in zip(weights, network.named_parameters(), strict=True):
        assert weight.name == name
        assert weight.merged().data_ptr() == parameter.data_ptr()


@pytest.mark.parametrize(("rank", "alpha", "scale"), [(4, 4.0, 1.0), (4, 32.0, 8.0), (8, 4.0, 0.5)])
def test_adapters_are_scaled_by_alpha_over_rank(rank: int, alpha: float, scale: float) -> None:
    # x ↦ Wx + scale · B(Ax) = (W + scale · BA) x, for the layer as for what is said to be its weight.
    lora = LoraConfig(rank=rank, alpha=alpha, targets=("q_proj",))
    network = adapted(lora)
    named = dict(network.named_parameters())
    a, b = (named[f"{Q_PROJ}.lora_{which}.default.weight"] for which in "AB")
    expected = plain().get_parameter(f"{Q_PROJ}.weight").double() + scale * b.double() @ a.double()
    merged = {w.name: w.merged() for w in checkpoint_weights(network, lora)}[f"{Q_PROJ}.weight"]
    torch.testing.assert_close(merged.double(), expected, rtol=0, atol=1e-6)
    inputs = torch.randn(5, 32)
    layer = network.get_submodule(Q_PROJ)
    torch.testing.assert_close(layer(inputs), F.linear(inputs, expected.float()), rtol=0, atol=1e-5)


def test_the_merged_model_is_the_adapted_model() -> None:
    lora = LoraConfig(rank=4, alpha=8.0)
    network = adapted(lora)
    merged = plain()
    merged.load_state_dict({w.name: w.merged() for w in checkpoint_weights(network, lora)}, strict=False)
    assert (logprobs(merged) - logprobs(plain())).abs().max() > 0.1
    torch.testing.assert_close(logprobs(merged), logprobs(network), rtol=0, atol=1e-5)


def test_merging_rounds_once() -> None:
    """In bf16 the sum W + BA is taken in fp32, not of a product that has been rounded already."""
    lora = LoraConfig(rank=4, alpha=4.0, targets=("q_proj",))
    network = adapted(lora, dtype=torch.bfloat16)
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    named = dict(network.named_parameters())
    a, b = (named[f"{Q_PROJ}.lora_{which}.default.weight"].float() for which in "AB")
    exact = named[f"{Q_PROJ}.base_layer.weight"].float() + b @ a
    weight = {w.name: w.merged() for w in checkpoint_weights(network, lora)}[f"{Q_PROJ}.weight"]
    assert torch.equal(weight, exact.bfloat16())


def test_new_adapters_and_adapters_that_are_off_change_nothing() -> None:
    lora = LoraConfig(rank=4)
    assert torch.equal(logprobs(adapted(lora, train=False)), logprobs(plain()))
    network = adapted(lora)
    before = logprobs(network)
    with adapters_off(network):
        assert torch.equal(logprobs(network), logprobs(plain()))
    assert torch.equal(logprobs(network), before)
    assert all(parameter.requires_grad for _, parameter in adapter_parameters(network))


def test_adapters_depend_on_the_seed_alone() -> None:
    def first(seed: int, draws: int) -> Tensor:
        network = plain()
        torch.rand(draws)  # as loading does, differently at ZeRO-3
        add_adapters(network, LoraConfig(rank=4), seed=seed)
        return adapter_parameters(network)[0][1].detach()

    assert torch.equal(first(3, draws=0), first(3, draws=10))
    assert not torch.equal(first(3, draws=0), first(4, draws=0))


def test_adapters_are_saved_as_peft_saves_them(tmp_path: Path) -> None:
    lora = LoraConfig(rank=4, alpha=8.0)
    network = adapted(lora)
    save_adapters(network, tmp_path / "ours", {n: p.detach() for n, p in adapter_parameters(network)})
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear")
    theirs = peft.get_peft_model(plain(), config)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    saved = {who: load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")}
    assert saved["ours"].keys() == saved["theirs"].keys()
    loaded = peft.PeftModel.from_pretrained(plain(), tmp_path / "ours")
    assert torch.equal(logprobs(loaded.get_base_model()), logprobs(network))


def test_a_model_is_loaded_as_configured(tmp_path: Path) -> None:
    plain().save_pretrained(tmp_path)
    network = load_model(tmp_path, ModelConfig())
    assert network.dtype is torch.bfloat16
    assert network.config._attn_implementation == ALONG_PATHS
    assert not adapter_parameters(network)
