"""Plans: parameters against real models, bytes against tables by hand and against what torch keeps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from searchrl.attention import ALONG_PATHS
from searchrl.batching import tree_of
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
from searchrl.plan import MemoryPlan, Phase, describe, plan_memory, plan_tokens, summary
from searchrl.plan.memory import GIB, SYNC_BUCKET_ELEMENTS, layer_activations
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
    monkeypatch.chdir(tmp_path)
    assert find_shape("Qwen/Qwen2.5-3B") == KNOWN_SHAPES["Qwen/Qwen2.5-3B"]
    transformers.Qwen2Config(**SIZES).save_pretrained(tmp_path / "Qwen" / "Qwen2.5-3B")
    assert find_shape("Qwen/Qwen2.5-3B") == found, "a folder of the name takes the hub model's place"


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
    amounts = [
        plan.amount("parameters", Phase.update) + plan.amount("gathered by ZeRO-3", Phase.update),
        plan.amount("gradients", Phase.update),
        plan.amount("optimizer", Phase.update),
        plan.amount("fp32 gradients", Phase.step),
    ]
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
    assert plan.amount("parameters", Phase.rollout) == 2 * (shape.parameters // 8)
    assert plan.amount("gathered by ZeRO-3", Phase.update) == 2 * 1_000_000_000
    assert (
        plan.amount("sync bucket", Phase.sync) == 2 * 152_064 * 3584
    )  # the head alone is larger than a bucket


def test_the_cache_holds_whole_blocks() -> None:
    cfg = config()
    cfg.engine = EngineConfig(kv_cache_gib=1000 / GIB, block_size=4)
    # A token: 2 x 3 layers x 1 head x 4 numbers x 2 bytes = 48; a block of four 192; five fit into 1,000.
    assert plan_memory(cfg, SMALL, world_size=1).kv_tokens == 20


def test_what_a_reference_and_adapters_change() -> None:
    cfg, shape = config(), KNOWN_SHAPES["Qwen/Qwen2.5-3B"]
    assert plan_memory(cfg, shape, world_size=2).amount("reference model", Phase.load) == 0
    cfg.loss.kl_coef = 0.001
    full = plan_memory(cfg, shape, world_size=2)
    assert full.amount("reference model", Phase.load) == 2 * shape.parameters
    cfg.model.lora = LoraConfig(rank=8)
    adapted = plan_memory(cfg, shape, world_size=2)
    trained = shape.adapter_parameters(8, ())
    assert adapted.amount("reference model", Phase.load) == 0
    assert adapted.amount("parameters", Phase.load) == 2 * (shape.parameters + trained)
    assert adapted.amount("optimizer", Phase.load) == 6 * trained
    chunk, head = 1024 * shape.vocabulary, shape.vocabulary * shape.hidden
    assert adapted.amount("head", Phase.update) == chunk * (
        2 * 4 + 2
    )  # the forward pass: no gradient of the head
    assert full.amount("head", Phase.update) == (chunk + head) * (4 + 2)
    assert full.amount("head", Phase.logprob) == chunk * (2 * 4 + 2)
    merged = 2048 * 11008  # an MLP weight: in fp32, the sum, and the result
    assert adapted.amount("sync bucket", Phase.sync) == merged * (4 + 4 + 2)
    assert full.amount("sync bucket", Phase.sync) == 0


def test_a_cpu_packs_a_tied_head_twice() -> None:
    cfg = config(DType.float32, 0)
    on_gpu = plan_memory(cfg, SMALL, world_size=1).amount("engine weights", Phase.rollout)
    cfg.device = Device.cpu
    assert (
        plan_memory(cfg, SMALL, world_size=1).amount("engine weights", Phase.rollout) - on_gpu == 4 * 10 * 8
    )
    untied = replace(SMALL, is_tied=False)
    assert (
        plan_memory(cfg, untied, world_size=1).amount("engine weights", Phase.rollout)
        == 4 * untied.parameters
    )


def test_ranks_that_hold_an_engine_split_its_weights_and_heads() -> None:
    cfg = config()
    cfg.engine = EngineConfig(kv_cache_gib=2000 / GIB, block_size=4, tensor_parallel=4)
    shape = replace(SMALL, heads=4, kv_heads=2)
    plan = plan_memory(cfg, shape, world_size=4)
    assert plan.amount("engine weights", Phase.rollout) == 2 * -(-shape.parameters // 4)
    # A token: 2 x 3 layers x 1 head of 2 x 4 numbers x 2 bytes = 48; a block of four 192; ten fit in 2,000.
    assert plan.kv_tokens == 40


def test_the_head_by_hand() -> None:
    cfg = config(DType.float32, 0)
    cfg.batching.logprob_chunk = 100
    chunk, weight = 100 * 10 * 4, 10 * 8 * 4
    assert plan_memory(cfg, SMALL, world_size=1).amount("head", Phase.update) == 2 * chunk  # the forward pass
    cfg.loss.entropy_coef = 0.1
    assert (
        plan_memory(cfg, SMALL, world_size=1).amount("head", Phase.update) == 2 * chunk + weight
    )  # the backward pass


def test_what_lives_when() -> None:
    """On GPUs the engine leaves for the update and the optimizer for the rollout; on a CPU all stays."""
    cfg, shape = config(), KNOWN_SHAPES["Qwen/Qwen2.5-3B"]
    cfg.loss.kl_coef = 0.001
    parts = {
        "engine weights": "rollout sync",
        "key-value cache": "rollout sync",
        "engine at work": "rollout",
        "parameters": "load rollout logprob update step sync",
        "optimizer": "load logprob update step",
        "reference model": "load logprob",
        "gradients": "update step",
        "ZeRO's bucket": "update",
        "activations": "logprob update",
        "head": "logprob update",
        "fp32 gradients": "step",
    }
    plan = plan_memory(cfg, shape, world_size=4)
    assert {part.name: " ".join(p for p in Phase if p in part.amounts) for part in plan.components} == parts
    assert plan.offloaded == sum(plan.amount(name, Phase.load) for name in ("optimizer", "reference model"))
    cfg.device = Device.cpu
    plan = plan_memory(cfg, shape, world_size=4)
    always = [part.name for part in plan.components if len(part.amounts) == len(Phase)]
    assert always == ["engine weights", "key-value cache", "parameters", "optimizer", "reference model"]
    assert plan.offloaded == 0


def test_an_evaluation_is_an_engine() -> None:
    plan = plan_memory(config(), KNOWN_SHAPES["Qwen/Qwen2.5-3B"], world_size=4, training=False)
    assert plan.phases == [Phase.load, Phase.rollout]
    assert [part.name for part in plan.components] == ["engine weights", "key-value cache", "engine at work"]


def test_the_total_of_a_phase_may_trust_estimates_less() -> None:
    plan = plan_memory(config(), SMALL, world_size=1)
    exact = sum(
        plan.amount(name, Phase.rollout) for name in ("engine weights", "key-value cache", "parameters")
    )
    work = plan.amount("engine at work", Phase.rollout)
    assert plan.total(Phase.rollout) == exact + work
    assert plan.total(Phase.rollout, estimates=0.5) == exact + work // 2


def test_the_actor_gathers_what_is_planned() -> None:
    from searchrl import actor

    assert actor.SYNC_BUCKET_ELEMENTS == SYNC_BUCKET_ELEMENTS


@pytest.mark.parametrize("is_packed", [False, True])
def test_activations_are_what_torch_keeps(is_packed: bool) -> None:
    """Bytes of everything that autograd saves in a forward pass, each storage once, without parameters."""
    # Four trajectories of 90 that share 40: 240 nodes, and 360 tokens along the paths.
    tree = tree_of([[*range(40), *[100 + number] * 50] for number in range(4)], share_prefixes=True)
    tokens = 240
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
            attn_implementation=ALONG_PATHS,  # type: ignore[call-arg]  # of every configuration
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

    assert tree.input_ids.shape == (1, tokens)
    paths = {"paths": tree.paths, "place": tree.place} if is_packed else {}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network.model(input_ids=tree.input_ids, position_ids=tree.position_ids, use_cache=False, **paths)
    cfg = config(DType.float32, 0)
    cfg.batching.max_tokens = cfg.episode.max_context_tokens = tokens
    cfg.batching.packing = is_packed
    planned = plan_memory(cfg, shape, world_size=1).amount("activations", Phase.update)
    assert planned == pytest.approx(sum(kept.values()), rel=0.15)


def test_checkpointing_keeps_inputs_and_one_layer() -> None:
    cfg = config(DType.float32, 0)
    cfg.batching.packing = False
    cfg.batching.max_tokens = cfg.episode.max_context_tokens = 10
    everything = plan_memory(cfg, SMALL, world_size=1).amount("activations", Phase.update)
    cfg.model.gradient_checkpointing = True
    plan = plan_memory(cfg, SMALL, world_size=1)
    assert plan.amount("activations", Phase.update) == everything // 3 + 3 * 10 * 8 * 4
    assert plan.amount("activations", Phase.logprob) == layer_activations(cfg, SMALL) == everything // 3


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


@pytest.mark.parametrize("device", list(Device))
def test_every_column_of_the_table_adds_up(device: Device) -> None:
    cfg = config()
    cfg.device, cfg.model.path, cfg.loss.kl_coef = device, "Qwen/Qwen2.5-3B", 0.001
    lines = describe(cfg, world_size=4).splitlines()
    start = next(number for number, line in enumerate(lines) if line.split() == list(Phase))
    table = {
        line[2:22].strip(): [float(line[22 + 9 * i : 31 + 9 * i].strip() or 0) for i in range(len(Phase))]
        for line in lines[start + 1 : -1]
    }
    sums = table.pop("sum")
    assert "~ activations" in table
    for number, total in enumerate(sums):
        assert total == pytest.approx(sum(row[number] for row in table.values()), abs=0.06)
    assert lines[-1].startswith(f"  peak {max(sums):.2f} GiB, in update")
    assert f"about {max(sums):.1f} GiB a rank, in update" in summary(cfg, world_size=4)
