from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchrl.data.text import clean, contains, normalize, pack, sentences, split_long

WORDS = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=30).map(" ".join)


@pytest.mark.parametrize(
    ("text", "phrase", "expected"),
    [
        ("Capital of Ghana: Accra.", "accra", True),
        ("The Gambia", "a the gambia", True),
        ("Area: 238,533 sq km", "238,533", True),
        ("Area: 238,533 sq km", "238", False),
        ("Accra", "", False),
        ("the a an", "The", False),
        ("(1328 – 1384)", "1384", True),
    ],
)
def test_a_phrase_is_found_as_whole_normalised_tokens(text: str, phrase: str, expected: bool) -> None:
    assert contains(text, phrase) is expected


def test_markup_goes_and_the_text_stays() -> None:
    raw = "<p>C&ocirc;te d'Ivoire\xa0<em>(west)</em></p><br>born 1871–1947\u200b\x00 , done"
    assert clean(raw) == "Côte d'Ivoire (west) born 1871 – 1947, done"


def test_initials_and_abbreviations_end_no_sentence() -> None:
    text = 'E. T. A. Hoffmann met Dr. King in St. Louis, U.S. He left (c. 1170). "Why?" Nobody knew.'
    # What looks like an initial or ends in a quote does not end a sentence: joining is the harmless mistake.
    assert sentences(text) == [
        "E. T. A. Hoffmann met Dr. King in St. Louis, U.S. He left (c. 1170).",
        '"Why?" Nobody knew.',
    ]


@given(units=st.lists(WORDS, max_size=12), limit=st.integers(3, 40), fresh=st.sets(st.integers(0, 12)))
def test_packing_keeps_every_unit_once_and_in_order(units: list[str], limit: int, fresh: set[int]) -> None:
    groups = pack(units, limit, fresh)
    assert [index for group in groups for index in group] == list(range(len(units)))
    for group in groups:
        assert not fresh & set(group[1:])
        words = sum(len(units[index].split()) for index in group)
        assert len(group) == 1 or words <= limit * 6 // 5


@given(parts=st.lists(WORDS, min_size=1, max_size=20), glue=st.sampled_from([". A ", "; ", ", "]))
def test_splitting_loses_no_word(parts: list[str], glue: str) -> None:
    text = glue.join(parts)
    pieces = split_long(text, 10)
    assert normalize(" ".join(pieces)) == normalize(text)
    if glue == ", " and max(len(part.split()) for part in parts) <= 10:
        assert max(len(piece.split()) for piece in pieces) <= 12
