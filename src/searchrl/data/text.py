"""Plain-text helpers: clean markup, compare answers, cut text into short passages of whole sentences."""

from __future__ import annotations

import functools
import hashlib
import html
import re
import string
from collections.abc import Iterable, Sequence, Set

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_BREAK_TAG = re.compile(r"</?(?:br|p|div|li|ul)\s*/?>", re.IGNORECASE)
_TAG = re.compile(r"<[^>]+>")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060\ufeff]")
_YEAR_RANGE = re.compile(r"(\d)–(?=\d|present)")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(“])")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(.])(?:[A-Za-z]|St|Ste|Mt|Ft|Dr|Mr|Mrs|Ms|Jr|Sr|No|Op|vs|ca|approx|lit|Gen|Col|Sgt|Lt|Inc|Co"
    r"|est)\.$"
)


@functools.lru_cache(maxsize=1 << 16)
def normalize(text: str) -> str:
    """Lower-case, without ASCII punctuation and the articles a/an/the, white space collapsed.

    The same comparison as the exact-match reward (PROTOCOL section 2).
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def contains(text: str, phrase: str) -> bool:
    """True if ``phrase`` stands in ``text`` as whole tokens, both normalised. An empty phrase never does."""
    wanted = normalize(phrase)
    return bool(wanted) and f" {wanted} " in f" {normalize(text)} "


def clean(raw: str) -> str:
    """Strip HTML, decode entities, drop control characters and collapse white space.

    A dash between two years gets spaces, so that each year is a token of its own for ``contains``.
    """
    text = _TAG.sub("", _BREAK_TAG.sub(" ", raw))
    text = html.unescape(text).replace("\xa0", " ")
    text = _CONTROL.sub(" ", text)
    text = _YEAR_RANGE.sub(r"\1 – ", text)
    return re.sub(r"\s+([,.;:)])", r"\1", " ".join(text.split()))


def sentences(text: str) -> list[str]:
    """Cut at sentence ends; initials and common abbreviations do not end a sentence."""
    parts: list[str] = []
    for piece in _SENTENCE_END.split(text):
        if parts and _ABBREVIATION.search(parts[-1]):
            parts[-1] += " " + piece
        elif piece:
            parts.append(piece)
    return parts


def pack(units: Iterable[str], limit: int, fresh: Set[int] = frozenset()) -> list[list[int]]:
    """Group consecutive units greedily into passages of at most ``limit`` words; returns unit indices.

    Units whose index is in ``fresh`` begin a passage in any case. A unit longer than the limit gets a
    passage of its own. A short last group joins the one before it if both together exceed the limit only a
    little (by a fifth): a stub of a few words helps nobody.
    """
    lengths = [len(unit.split()) for unit in units]
    groups: list[list[int]] = []
    size = 0
    for index, length in enumerate(lengths):
        if groups and size + length <= limit and index not in fresh:
            groups[-1].append(index)
            size += length
        else:
            groups.append([index])
            size = length
    if len(groups) > 1 and size < limit // 3 and groups[-1][0] not in fresh:
        before = sum(lengths[index] for index in groups[-2])
        if before + size <= limit * 6 // 5:
            last = groups.pop()
            groups[-1] += last
    return groups


def split_long(text: str, limit: int) -> list[str]:
    """Cut a text above ``limit`` words at sentence ends, else semicolons, else commas; parts stay whole."""
    if len(text.split()) <= limit * 6 // 5:  # what ``pack`` tolerates
        return [text]
    for cut, glue in ((sentences(text), " "), (text.split("; "), "; "), (text.split(", "), ", ")):
        if len(cut) > 1:
            parts = [glue.join(cut[index] for index in group) for group in pack(cut, limit)]
            if len(parts) > 1:
                return [piece for part in parts for piece in split_long(part, limit)]
    return [text]


def stable_hash(*parts: object) -> int:
    """A 64-bit hash of the parts' text, the same in every process and on every machine."""
    joined = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(joined.encode()).digest()[:8], "big")


def choose(options: Sequence[str], *parts: object) -> str:
    """One of the options, chosen by ``stable_hash`` of the parts."""
    return options[stable_hash(*parts) % len(options)]
