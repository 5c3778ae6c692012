"""How an answer compares with the gold answers. Pure functions of text, shared by rewards and evaluation."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Lower-case, drop ASCII punctuation and the articles a/an/the, collapse white space (SQuAD's rule)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str | None, golden_answers: Sequence[str]) -> bool:
    """True if the normalised answer equals any normalised gold; an empty one on either side never does."""
    prediction = normalize(answer or "")
    return bool(prediction) and any(normalize(gold) == prediction for gold in golden_answers)


def f1(answer: str | None, golden_answers: Sequence[str]) -> float:
    """Token F1 of the normalised answer with the nearest gold, in [0, 1] (SQuAD, arXiv 1606.05250, 6.1).

    Tokens are counted as often as they occur. An empty answer or gold has F1 0 with everything.
    """
    return max(_f1(normalize(answer or "").split(), normalize(gold).split()) for gold in golden_answers)


def _f1(predicted: Sequence[str], gold: Sequence[str]) -> float:
    common = sum((Counter(predicted) & Counter(gold)).values())
    return 2 * common / (len(predicted) + len(gold)) if common else 0.0


def sub_exact_match(answer: str | None, golden_answers: Sequence[str]) -> bool:
    """True if the answer contains a gold as whole tokens, both normalised.

    Stricter than the usual search for characters, in which the answer "1975" contains the gold "7".
    """
    return contains_answer(answer or "", golden_answers)


def contains_answer(text: str, golden_answers: Sequence[str]) -> bool:
    """True if a gold answer is a whole-token subsequence of the text, both normalised."""
    padded = f" {normalize(text)} "
    golds = (normalize(gold) for gold in golden_answers)
    return any(gold and f" {gold} " in padded for gold in golds)
