"""Small things that several test files build."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from searchrl.evaluation.results import Result
from searchrl.rewards import Components, Reward
from searchrl.trajectory import Outcome

PLAIN_RESULT = Result(
    id="0",
    data_source="t",
    hops=0,
    outcome=Outcome.ANSWERED,
    exact_match=False,
    f1=0.0,
    sub_exact_match=False,
    valid_format=False,
    retrieval_hit=False,
    searches=0,
    searches_with_gold=0,
    sampled_tokens=0,
    total_tokens=0,
    error=None,
)
"""A wrong answer without a search."""


def plain_reward(total: float) -> Reward:
    """A reward for an answer."""
    return Reward(
        components=Components(answer=total),
        exact_match=0.0,
        judged=None,
        valid_format=False,
        retrieval_hit=False,
        evidence=None,
    )


def make_encoder(folder: Path, texts: Sequence[str], *, seed: int) -> Path:
    """A BERT with random weights and a vocabulary of the words of texts and prefixes."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    prefixes = "query : passage represent this sentence for searching relevant passages"
    words = sorted({word for text in (*texts, prefixes) for word in text.lower().replace(".", " ").split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BertModel(
            BertConfig(
                vocab_size=len(vocabulary),
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                max_position_embeddings=64,
                initializer_range=0.5,
            )
        )
    model.save_pretrained(folder)
    return folder
