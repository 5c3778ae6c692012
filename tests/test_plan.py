"""Plans: parameters against real models, bytes against tables by hand and against what torch keeps."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from searchrl.config import (
    Config,
    DataConfig,
    Device,
    DType,
    EngineConfig,
    EpisodeConfig,
    LoraConfig,
    ModelConfig,
)
from searchrl.model_shape import KNOWN_SHAPES, ModelShape, find_shape, read_shape
from searchrl.models import ModelError, resolve_model
from searchrl.plan import GIB, MemoryPlan, describe, plan_memory, plan_tokens, summary
from searchrl.policy import add_adapters, load_model

SMALL = ModelShape(
    layers=3,
    hidden=8,
    intermediate=20,
    heads=2,
    kv_heads=1,
    head_dim=4,
    vocabulary=10,
    is_tied=True,
)
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


# --- shapes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("Qwen/Qwen2.5-0.5B", 494_032_768),  # the totals that the hub states
        ("Qwen/Qwen2.5-3B-Instruct", 3_085_938_688),
        ("Qwen/Qwen2.5-7B", 7_615_616_512),
        ("package:smollm2-135m", 134_515_008),
    ],
)
def test_published_totals(model: str, parameters: int) -> None:
    assert KNOWN_SHAPES[model].parameters == parameters


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "kind",
    [
        transformers.LlamaConfig,
        transformers.MistralConfig,
        transformers.Qwen2Config,
        transformers.Qwen3Config,
    ],
)
def test_the_formula_counts_what_a_model_has(kind: Any, tied: bool, tmp_path: Path) -> None:
    config = kind(**SIZES, tie_word_embeddings=tied)
    config.save_pretrained(tmp_path)
    shape = read_shape(tmp_path / "config.json")
    assert shape is not None
    with torch.device("meta"):
        network = transformers.AutoModelForCausalLM.from_config(config)
    assert shape.parameters == sum(parameter.numel() for parameter in network.parameters())


def test_the_table_agrees_with_built_models(tiny_model: Path, tiny_model_untied: Path) -> None:
    assert read_shape(tiny_model / "config.json") == find_shape("random:tiny")
    assert read_shape(tiny_model_untied / "config.json") == find_shape("random:tiny-untied")


@pytest.mark.integration
def test_the_table_agrees_with_the_converted_model(assets: Path) -> None:
    folder = Path(resolve_model("package:smollm2-135m", assets))
    assert read_shape(folder / "config.json") == find_shape("package:smollm2-135m")


@pytest.mark.parametrize("targets", [(), ("q_proj", "down_proj")])
def test_adapters_are_counted_as_peft_makes_them(tiny_model: Path, targets: tuple[str, ...]) -> None:
    network = load_model(tiny_model, ModelConfig(dtype=DType.float32))
    add_adapters(network, LoraConfig(rank=4, targets=targets), seed=0)
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    assert KNOWN_SHAPES["random:tiny"].adapter_parameters(4, targets) == trained


def test_shapes_are_found_on_this_machine_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    transformers.Qwen2Config(**SIZES).save_pretrained(tmp_path / "models--org--some" / "snapshots" / "abc")
    refs = tmp_path / "models--org--some" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc", encoding="utf-8")
    found = find_shape("org/some")
    assert found is not None
    assert (found.layers, found.has_qkv_bias) == (3, True)
    assert find_shape("org/other") is None
    assert find_shape("a/b/c") is None
    assert find_shape("") is None


def test_architectures_that_the_formula_does_not_cover_have_no_shape(tmp_path: Path) -> None:
    transformers.GPT2Config().save_pretrained(tmp_path)
    assert read_shape(tmp_path / "config.json") is None


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "llama"}', json.dumps({"model_type": "qwen2"})])
def test_a_broken_configuration_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=rf"{tmp_path}/config.json is no model configuration"):
        find_shape(str(tmp_path))


# --- memory ---------------------------------------------------------------------------------------------


def config(dtype: DType = DType.bfloat16, zero_stage: int = 2) -> Config:
    cfg = Config(device=Device.cuda)
    cfg.model = ModelConfig(path="random:tiny", dtype=dtype)
    cfg.deepspeed.zero_stage = zero_stage
    return cfg


def units(plan: MemoryPlan, parameters: int) -> tuple[float, float, float, float]:
    """Bytes a parameter: weights, gradients, optimizer, gradients of the step."""
    amounts = (plan.parameters, plan.gradients, plan.optimizer, plan.step_gradients)
    return tuple(round(amount / parameters, 2) for amount in amounts)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("dtype", "zero_stage", "world_size", "expected"),
    [
        (DType.float32, 0, 1, (4, 4, 8, 0)),
        (DType.float32, 0, 4, (4, 4, 8, 0)),
        (DType.bfloat16, 1, 1, (2, 2, 12, 4)),  # 16 bytes, and the step's
        (DType.bfloat16, 1, 4, (2, 2, 3, 1)),
        (DType.bfloat16, 2, 4, (2, 0.5, 3, 1)),
        (DType.bfloat16, 3, 4, (2.5, 0.5, 3, 1)),  # a quarter, and all of so small a model gathered
        (DType.float32, 2, 2, (4, 2, 6, 2)),
    ],
)
def test_model_states(
    dtype: DType, zero_stage: int, world_size: int, expected: tuple[float, float, float, float]
) -> None:
    shape = replace(SMALL, hidden=800, intermediate=2000)
    plan = plan_memory(config(dtype, zero_stage), shape, world_size=world_size)
    assert units(plan, shape.parameters) == expected


def test_at_stage_three_a_large_model_is_gathered_in_parts() -> None:
    shape = KNOWN_SHAPES["Qwen/Qwen2.5-7B"]
    plan = plan_memory(config(zero_stage=3), shape, world_size=8)
    assert plan.parameters == 2 * (shape.parameters // 8 + 1_000_000_000)


def test_the_cache_holds_whole_blocks() -> None:
    cfg = config()
    cfg.engine = EngineConfig(kv_cache_gib=1000 / GIB, block_size=4)
    # A token: 2 x 3 layers x 1 head x 4 numbers x 2 bytes = 48; a block of four 192; five fit into 1,000.
    assert plan_memory(cfg, SMALL, world_size=1).kv_tokens == 20


def test_what_a_reference_and_adapters_change() -> None:
    cfg, shape = config(), KNOWN_SHAPES["Qwen/Qwen2.5-3B"]
    assert plan_memory(cfg, shape, world_size=2).reference == 0
    cfg.loss.kl_coef = 0.001
    full = plan_memory(cfg, shape, world_size=2)
    assert full.reference == 2 * shape.parameters
    cfg.model.lora = LoraConfig(rank=8)
    adapted = plan_memory(cfg, shape, world_size=2)
    trained = shape.adapter_parameters(8, ())
    assert adapted.reference == 0
    assert adapted.parameters == 2 * (shape.parameters + trained)
    assert adapted.optimizer == 6 * trained
    assert adapted.head == 1024 * shape.vocabulary * (2 * 4 + 2)  # the forward pass: no gradient of the head
    assert full.head == 1024 * shape.vocabulary * (4 + 2) + shape.vocabulary * shape.hidden * (4 + 2)


def test_a_cpu_packs_a_tied_head_twice() -> None:
    cfg = config(DType.float32, 0)
    on_gpu = plan_memory(cfg, SMALL, world_size=1).engine_weights
    cfg.device = Device.cpu
    assert plan_memory(cfg, SMALL, world_size=1).engine_weights - on_gpu == 4 * 10 * 8
    untied = replace(SMALL, is_tied=False)
    assert plan_memory(cfg, untied, world_size=1).engine_weights == 4 * untied.parameters


def test_ranks_that_hold_an_engine_split_its_weights_and_heads() -> None:
    cfg = config()
    cfg.engine = EngineConfig(kv_cache_gib=2000 / GIB, block_size=4, tensor_parallel=4)
    shape = replace(SMALL, heads=4, kv_heads=2)
    plan = plan_memory(cfg, shape, world_size=4)
    assert plan.engine_weights == 2 * -(-shape.parameters // 4)
    # A token: 2 x 3 layers x 1 head of 2 x 4 numbers x 2 bytes = 48; a block of four 192; ten fit in 2,000.
    assert plan.kv_tokens == 40


def test_the_head_by_hand() -> None:
    cfg = config(DType.float32, 0)
    cfg.batching.logprob_chunk = 100
    chunk, weight = 100 * 10 * 4, 10 * 8 * 4
    assert plan_memory(cfg, SMALL, world_size=1).head == 2 * chunk  # the forward pass
    cfg.loss.entropy_coef = 0.1
    assert plan_memory(cfg, SMALL, world_size=1).head == 2 * chunk + weight  # the backward pass


def test_what_lives_together() -> None:
    plan = MemoryPlan(
        engine_weights=1,
        kv_cache=2,
        parameters=3,
        optimizer=4,
        reference=5,
        gradients=10,
        reduce_buffer=20,
        activations=30,
        head=40,
        step_gradients=50,
        engine_work=7,
        kv_tokens=0,
    )
    assert (plan.resident, plan.update, plan.peak) == (15, 100, 115)
    assert replace(plan, step_gradients=95).update == 105
    assert replace(plan, engine_work=200).peak == 215


@pytest.mark.parametrize("is_packed", [False, True])
def test_activations_are_what_torch_keeps(is_packed: bool) -> None:
    """Bytes of everything that autograd saves in a forward pass, each storage once, without parameters."""
    tokens = 256
    shape = replace(KNOWN_SHAPES["random:tiny"], layers=4)
    network = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
        )
    )
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, int] = {}
    alive: list[torch.Tensor] = []  # a freed storage's address may be given out again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None] if is_packed else None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network.model(
            input_ids=torch.zeros(1, tokens, dtype=torch.long), attention_mask=mask, use_cache=False
        )
    cfg = config(DType.float32, 0)
    cfg.batching.max_tokens = cfg.episode.max_context_tokens = tokens
    cfg.batching.packing = is_packed
    planned = plan_memory(cfg, shape, world_size=1).activations
    assert planned == pytest.approx(sum(kept.values()), rel=0.15)


def test_checkpointing_keeps_inputs_and_one_layer() -> None:
    cfg = config(DType.float32, 0)
    cfg.batching.packing = False
    cfg.batching.max_tokens = cfg.episode.max_context_tokens = 10
    everything = plan_memory(cfg, SMALL, world_size=1).activations
    cfg.model.gradient_checkpointing = True
    assert plan_memory(cfg, SMALL, world_size=1).activations == everything // 3 + 3 * 10 * 8 * 4


# --- tokens ---------------------------------------------------------------------------------------------


def token_config() -> Config:
    cfg = config()
    cfg.steps, cfg.groups_per_step, cfg.group_size = 10, 6, 4
    cfg.update.minibatches, cfg.update.epochs = 3, 2
    cfg.batching.max_tokens = 250
    cfg.episode = EpisodeConfig(
        max_searches=2, max_turn_tokens=10, max_observation_tokens=20, max_context_tokens=100
    )
    return cfg


def test_tokens_by_hand(tmp_path: Path) -> None:
    rows = [
        {
            "id": str(i),
            "question": "q",
            "golden_answers": ["a"],
            "data_source": "d",
            "metadata": {"hops": i % 3},
        }
        for i in range(30)
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    cfg = token_config()
    cfg.data = DataConfig(train=str(path), eval=str(path), train_hops=(1, 2))
    cfg.eval.questions = 12
    plan = plan_tokens(cfg, world_size=2)
    assert plan.trajectories_per_step == 24
    assert plan.longest_episode == 3 * 10 + 2 * 20
    assert plan.most_tokens_per_step == 2400
    assert plan.most_microbatches == 2 * 6  # two a row; 4 of each mini-batch's 8 are one rank's; 6 of those
    assert (plan.optimizer_steps_per_rollout, plan.optimizer_steps) == (6, 60)
    assert (plan.questions_drawn, plan.train_questions, plan.eval_questions) == (60, 20, 12)
    cfg.eval.questions = 0
    assert plan_tokens(cfg, world_size=2).eval_questions == 30
    assert "60 questions drawn of 20, 3.00 epochs; 30 in the evaluation" in describe(cfg, world_size=2)


def test_without_data_or_shape_the_plan_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cfg = token_config()
    cfg.model.path = "org/other"
    text = describe(cfg, world_size=1)
    assert "60 questions drawn\n" in text
    assert text.endswith("memory: unknown until org/other is on this machine (its shape is)")
    assert "memory unknown" in summary(cfg, world_size=1)


def test_every_line_of_the_plan_adds_up(tmp_path: Path) -> None:
    cfg = deepcopy(config())
    cfg.model.path = "Qwen/Qwen2.5-3B"
    cfg.loss.kl_coef = 0.001
    lines = describe(cfg, world_size=4).splitlines()
    amounts = {line[2:36].strip(): float(line[36:44]) for line in lines if line[41:42] == "."}
    resident = ("engine: weights", "engine: key-value cache", "trainer: parameters", "trainer: optimizer")
    assert amounts["resident"] == pytest.approx(
        sum(amounts[name] for name in (*resident, "reference model")), abs=0.03
    )
    update = ("gradients", "ZeRO's bucket", "~ activations", "~ head")
    assert amounts["peak"] == pytest.approx(
        amounts["resident"] + sum(amounts[f"update: {name}"] for name in update), abs=0.05
    )
    assert f"about {amounts['peak']:.1f} GiB a rank" in summary(cfg, world_size=4)
