"""Sentence embeddings from a Hugging Face folder: prefix, tokenise, run, pool, normalise.

What differs between model families is data (`EncoderSpec`), not code. Texts are sorted by length before they
are batched, because one long text pads its whole batch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


class EncoderFamily(StrEnum):
    """Model families with known prefixes and pooling."""

    E5 = "e5"
    BGE = "bge"
    MINILM = "minilm"


class Pooling(StrEnum):
    """How the token states of a text become one vector."""

    MEAN = "mean"
    CLS = "cls"


class TextKind(StrEnum):
    """Which of the two prefixes a text gets."""

    QUERY = "query"
    PASSAGE = "passage"


@dataclass(kw_only=True, slots=True, frozen=True)
class EncoderSpec:
    """How a family wants its texts treated."""

    query_prefix: str
    passage_prefix: str
    pooling: Pooling
    max_length: int
    """Tokens, special ones included; longer texts are cut."""
    normalize: bool
    """Scale vectors to length 1, which makes the inner product a cosine."""

    def prefix(self, kind: TextKind) -> str:
        """Return what is put before a text of this kind."""
        return self.query_prefix if kind is TextKind.QUERY else self.passage_prefix


SPECS: dict[EncoderFamily, EncoderSpec] = {
    EncoderFamily.E5: EncoderSpec(
        query_prefix="query: ",
        passage_prefix="passage: ",
        pooling=Pooling.MEAN,
        max_length=256,
        normalize=True,
    ),
    EncoderFamily.BGE: EncoderSpec(
        query_prefix="Represent this sentence for searching relevant passages: ",
        passage_prefix="",
        pooling=Pooling.CLS,
        max_length=512,
        normalize=True,
    ),
    EncoderFamily.MINILM: EncoderSpec(
        query_prefix="", passage_prefix="", pooling=Pooling.MEAN, max_length=256, normalize=True
    ),
}


class Encoder:
    """A sentence encoder in fp32.

    ``path`` is a folder that `transformers.AutoModel` and `AutoTokenizer` can load; nothing is downloaded.
    With ``threads`` above 1 that many batches run at once on the CPU, each on one core: on busy cores this
    wastes less than one batch over all of them, whose threads wait for one another after every operation.
    ``device`` is a torch device; a GPU takes one batch after the other.
    Raises `FileNotFoundError` if the folder has no ``config.json``.
    """

    def __init__(
        self,
        path: str | Path,
        family: EncoderFamily,
        *,
        batch_size: int = 32,
        threads: int = 1,
        device: str = "cpu",
    ) -> None:
        self.path = Path(path)
        self.family = family
        self.spec = SPECS[family]
        self.device = device
        self._batch_size = batch_size
        self._threads = threads if device == "cpu" else 1
        if not (self.path / "config.json").is_file():
            raise FileNotFoundError(f"{self.path} is no Hugging Face model folder: it has no config.json")
        import torch
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging as transformers_logging

        self._tokenizer: Any = AutoTokenizer.from_pretrained(
            self.path, local_files_only=True, trust_remote_code=False
        )
        bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()  # a bar for a load of milliseconds
        self._model: Any = AutoModel.from_pretrained(
            self.path,
            local_files_only=True,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
        ).eval()
        self._model.to(device)
        if bars:
            transformers_logging.enable_progress_bar()
        limit = getattr(self._model.config, "max_position_embeddings", self.spec.max_length)
        self._max_length = min(self.spec.max_length, int(limit))

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return int(self._model.config.hidden_size)

    def encode(
        self, texts: Sequence[str], kind: TextKind, *, on_progress: Callable[[int], None] | None = None
    ) -> npt.NDArray[np.float32]:
        """Return the vectors of ``texts``, float32 [N, dim], in their order.

        ``on_progress`` is called with the number of texts finished since the last call.
        """
        vectors = np.empty((len(texts), self.dim), dtype=np.float32)
        if not texts:
            return vectors
        prefix = self.spec.prefix(kind)
        token_ids: list[list[int]] = self._tokenizer(
            [prefix + text for text in texts], truncation=True, max_length=self._max_length
        )["input_ids"]
        order = sorted(range(len(texts)), key=lambda i: -len(token_ids[i]))
        batches = [order[i : i + self._batch_size] for i in range(0, len(order), self._batch_size)]
        inputs = ([token_ids[i] for i in batch] for batch in batches)
        for batch, result in zip(batches, self._run(inputs), strict=True):
            vectors[batch] = result
            if on_progress is not None:
                on_progress(len(batch))
        return vectors

    def _run(self, inputs: Iterable[list[list[int]]]) -> Iterator[npt.NDArray[np.float32]]:
        """Yield the vectors of each batch of token ids, in their order."""
        if self._threads == 1:
            yield from map(self._forward, inputs)
            return
        import torch

        before = torch.get_num_threads()
        try:
            with ThreadPoolExecutor(self._threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                yield from pool.map(self._forward, inputs)
        finally:
            torch.set_num_threads(before)  # the setting of a worker leaks into the whole process

    def _forward(self, token_ids: list[list[int]]) -> npt.NDArray[np.float32]:
        """Return the vectors of one batch of token ids, float32 [B, dim]."""
        import torch

        longest = max(map(len, token_ids))
        pad = self._tokenizer.pad_token_id or 0
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in token_ids]).to(self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in token_ids]).to(
            self.device
        )
        with torch.inference_mode():
            states = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
            if self.spec.pooling is Pooling.CLS:
                pooled = states[:, 0]
            else:
                weights = mask.unsqueeze(-1).to(states.dtype)
                pooled = (states * weights).sum(1) / weights.sum(1)
            if self.spec.normalize:
                pooled = torch.nn.functional.normalize(pooled, dim=-1)
        result: npt.NDArray[np.float32] = pooled.cpu().numpy()
        return result


def encoder_dim(path: str | Path) -> int:
    """Length of the vectors of the encoder in ``path``, without loading it.

    Raises `FileNotFoundError` if the folder has no ``config.json``.
    """
    config = Path(path) / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{path} is no Hugging Face model folder: it has no config.json")
    return int(json.loads(config.read_text())["hidden_size"])


def weights_fingerprint(path: str | Path) -> str:
    """Return the hex SHA-256 over what decides an encoder's vectors: weights, configuration, tokenizer."""
    folder = Path(path)
    names = {"config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"}
    files = sorted(f for f in folder.iterdir() if f.name in names or f.suffix in (".safetensors", ".bin"))
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(f"{file.name}:{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
