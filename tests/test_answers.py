"""Normalisation, exact match, F1 and containment, as tables and against second implementations."""

from __future__ import annotations

import random
import string
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchrl.answers import contains_answer, exact_match, f1, normalize, sub_exact_match


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Lisbon", "lisbon"),
        ("  The  Lisbon.\n", "lisbon"),
        ("a an the", ""),
        ("theatre", "theatre"),
        ("The Theatre of a Nation", "theatre of nation"),
        ("U.S.A.", "usa"),
        ("rock-n-roll", "rocknroll"),
        ("O'Brien's", "obriens"),
        ("1,000", "1000"),
        ("«Ça»", "«ça»"),  # only ASCII punctuation goes
        ("a.b", "ab"),  # punctuation goes first, then articles
        ("a. b", "b"),
        ("the\u00a0end", "end"),
        ("", ""),
        ("?!", ""),
    ],
)
def test_normalize(text: str, normal: str) -> None:
    assert normalize(text) == normal


def normalize_by_hand(text: str) -> str:
    """SQuAD's rule character by character, without a regular expression."""
    kept = [c for c in "".join(map(str.lower, text)) if c not in string.punctuation]
    words: list[str] = []
    run, in_word = "", False
    for c in [*kept, " "]:
        is_word = c.isalnum() or c == "_"  # what \b looks at
        if run and is_word != in_word:
            words.append(" " if run in ("a", "an", "the") else run)
            run = ""
        run, in_word = run + c, is_word
    words.append(run)
    return " ".join("".join(words).split())


@given(
    st.one_of(
        st.text(max_size=20),
        st.lists(
            st.sampled_from(["a", "an", "The", "the", "x", " ", ".", "-", "\n", "é", "_", "’s", "2", "İ"]),
            max_size=12,
        ).map("".join),
    )
)
def test_normalize_against_a_second_implementation(text: str) -> None:
    # Lower-casing depends on neighbours for the final sigma alone.
    text = text.replace("Σ", "s")
    assert normalize(text) == normalize_by_hand(text)


@pytest.mark.parametrize(
    ("answer", "golds", "matched"),
    [
        ("Lisbon", ["Lisbon"], True),
        ("the lisbon!", ["Lisbon"], True),
        ("Lisboa", ["Lisbon", "Lisboa"], True),
        ("Lisbon, Portugal", ["Lisbon"], False),
        ("Lis", ["Lisbon"], False),
        ("", ["Lisbon"], False),
        (None, ["Lisbon"], False),
        ("The", ["a"], False),  # both empty once normalised
        ("", [""], False),
        ("x", [], False),
    ],
)
def test_exact_match(answer: str | None, golds: list[str], matched: bool) -> None:
    assert exact_match(answer, golds) is matched


@pytest.mark.parametrize(
    ("text", "golds", "contained"),
    [
        ("He lived in Lisbon.", ["Lisbon"], True),
        ("He lived in Lisbonne.", ["Lisbon"], False),
        ("in New\nYork City", ["new york"], True),
        ("in New Jersey, York", ["new york"], False),
        ("the a", ["a"], False),
        ("", ["x"], False),
        ("x", ["y", "X"], True),
    ],
)
def test_a_gold_is_contained_as_whole_words(text: str, golds: list[str], contained: bool) -> None:
    assert contains_answer(text, golds) is contained


@pytest.mark.parametrize(
    ("answer", "golds", "expected"),
    [
        ("Lisbon", ["Lisbon"], 1.0),
        ("the city of Lisbon", ["Lisbon"], 2 * 1 / (3 + 1)),  # precision 1/3, recall 1
        ("Lisbon", ["Lisbon city", "Porto"], 2 * 1 / (1 + 2)),
        ("new new york", ["new york"], 2 * 2 / (3 + 2)),  # one "new" of two is common
        ("Porto", ["Lisbon"], 0.0),
        ("", ["Lisbon"], 0.0),
        (None, ["Lisbon"], 0.0),
        ("the", ["a"], 0.0),  # both empty once normalised
    ],
)
def test_f1(answer: str | None, golds: list[str], expected: float) -> None:
    assert f1(answer, golds) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "golds", "contained"),
    [("in Lisbon", ["Lisbon"], True), ("in 1975", ["7"], False), (None, ["x"], False)],
)
def test_sub_exact_match(answer: str | None, golds: list[str], contained: bool) -> None:
    assert sub_exact_match(answer, golds) is contained


# --- many strings ---------------------------------------------------------------------------------------

PIECES = [
    *["a", "an", "the", "The", "AN", "A", "THE", "than", "theatre", "ant", "band"],  # articles and not
    *["Lisbon", "lisbon", "New", "York", "7", "1975", "x", "I", "İ", "ß", "é", "e\u0301", "東京", "ñ", "ﬁ"],
    *[" ", "  ", "\t", "\n", "\u00a0", "\u2009", "\u200b", "\x1c", "\x00"],
    *[".", ",", "-", "'", "’", '"', "«", "_", "!", "(", ")", "$", "€", "“", "…", "\\", "/", "🦊"],
]


def random_strings(count: int, seed: int) -> Iterator[str]:
    """Words, articles, punctuation and spaces in any order, and now and then any characters at all."""
    rng = random.Random(seed)
    for _ in range(count):
        if rng.random() < 0.1:
            codes = [rng.choice([rng.randrange(0x250), rng.randrange(0xD800), 0x1F600]) for _ in range(8)]
            text = "".join(map(chr, codes[: rng.randrange(9)]))
        else:
            text = "".join(rng.choices(PIECES, k=rng.randrange(9)))
        yield text.replace("Σ", "s")  # the one character whose lower case depends on its neighbours


def f1_by_sorting(predicted: list[str], gold: list[str]) -> float:
    """Precision and recall over two sorted lists, merged."""
    left, right, common = sorted(predicted), sorted(gold), 0
    while left and right:
        if left[-1] == right[-1]:
            common += 1
            left.pop()
            right.pop()
        else:
            (left if left[-1] > right[-1] else right).pop()
    if not common:
        return 0.0
    precision, recall = common / len(predicted), common / len(gold)
    return 2 * precision * recall / (precision + recall)


def test_a_hundred_thousand_strings_against_second_implementations() -> None:
    rng = random.Random(7)
    matched = overlapping = 0
    earlier = [(gold, normalize_by_hand(gold)) for gold in ("Lisbon", "the", "New York")]
    for text in random_strings(100_000, seed=6):
        normal = normalize_by_hand(text)
        assert normalize(text) == normal, text
        variant = rng.choice([text.upper(), f"The {text}.", f"({text})", f"{text} x"]).replace("Σ", "s")
        pairs = rng.sample([*earlier, (variant, normalize_by_hand(variant))], k=rng.randrange(1, 3))
        golds, normals = [gold for gold, _ in pairs], [by_hand for _, by_hand in pairs]
        found = exact_match(text, golds)
        assert found is (normal != "" and normal in normals), (text, golds)
        score = f1(text, golds)
        wanted = max(f1_by_sorting(normal.split(), gold.split()) for gold in normals)
        assert abs(score - wanted) < 1e-12, (text, golds)
        assert not found or score == 1.0
        matched, overlapping = matched + found, overlapping + (0 < score < 1)
        earlier[rng.randrange(3)] = (text, normal)
    assert matched > 10_000
    assert overlapping > 5_000
