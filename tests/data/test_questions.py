from __future__ import annotations

from collections import Counter

import pytest

from searchrl.data import DataError
from searchrl.data.facts import Entity, Fact, Link, Passage
from searchrl.data.questions import Question, one_hop, sound, two_hops
from searchrl.data.templates import ASK, DESCRIBE
from searchrl.data.values import RELATIONS, REVERSIBLE
from searchrl.data.worldfacts import assign_splits, pick

PASSAGES = [
    Passage(title="Ghana: Capital", text="Capital of Ghana: Accra."),
    Passage(title="x", text="Cedis, 1957."),
]
GHANA = Entity(key="country/gh", name="Ghana", kind="country", anchor="country/gh")
GEORGIA = Entity(key="country/gg", name="the Georgia", kind="country", anchor="country/gg")


def fact(relation: str, *answers: str, subject: Entity = GHANA, passage: int = 0) -> Fact:
    return Fact(subject=subject, relation=relation, answers=answers, passage=passage)


def question(text: str, answer: str, relation: str = "capital") -> Question:
    return Question(
        text=text,
        answers=(answer,),
        relation=relation,
        passages=(0,),
        queries=("q",),
        bridge=None,
        anchors=("a",),
    )


def test_a_bridge_names_the_clue_and_asks_for_the_target() -> None:
    link = Link(relation="capital", clue="Accra", target="country/gh", evidence=("Ghana",), passage=0)
    facts = [fact("capital", "Accra"), fact("currency", "cedis", passage=1), fact("domain", ".gh", passage=0)]
    (made,) = two_hops(facts, [link])  # not the link's own relation, not the link's own passage
    assert "Accra" in made.text
    assert "Ghana" not in made.text
    assert made.relation == "capital>currency"
    assert made.queries == ("Accra capital", "Ghana currency")
    assert (made.passages, made.bridge, made.hops) == ((0, 1), "Ghana", 2)


def test_one_hop_questions_keep_the_article_and_queries_do_not() -> None:
    (made,) = one_hop([fact("currency", "laris", subject=GEORGIA, passage=1)])
    assert "the Georgia" in made.text
    assert made.queries == ("Georgia currency",)


def test_questions_that_help_or_mislead_are_dropped() -> None:
    kept = question("Which city rules Ghana?", "Accra")
    asked = [
        kept,
        question("Is Accra the capital?", "Accra"),
        question("Who?", "Accra"),
        question("who", "Ghana"),
        question("Twice?", "Accra"),
        question("Twice?", "accra"),
    ]
    assert sound(asked, PASSAGES) == [kept, asked[4]]


def test_an_answer_that_its_passage_lacks_is_an_error() -> None:
    with pytest.raises(DataError, match="no answer of"):
        sound([question("Who?", "Kumasi")], PASSAGES)


def test_no_answer_dominates_a_relation_and_relations_take_turns() -> None:
    euros = [question(f"euro {n}?", "euro", "currency") for n in range(50)]
    others = [question(f"other {n}?", f"coin {n}", "currency") for n in range(50)]
    rare = [question("rare?", "x", "anthem")]
    picked = pick(euros + others + rare, 40, seed=0)
    assert len(picked) == 40
    assert rare[0] in picked
    assert Counter(q.answers for q in pick(euros + others, 1000, seed=0))["euro",] == 6


def test_splits_are_disjoint_and_of_the_asked_size() -> None:
    entities = [
        Entity(key=f"{kind}/{n}", name="n", kind="k", anchor=f"{kind}/{n}")
        for kind in ("country", "article")
        for n in range(50)
    ]
    splits = assign_splits(entities, 0)
    assert Counter((anchor.split("/")[0], split) for anchor, split in splits.items()) == {
        (kind, split): count
        for kind in ("country", "article")
        for split, count in (("train", 29), ("dev", 7), ("test", 14))
    }
    assert assign_splits(entities[::-1], 0) == splits
    assert assign_splits(entities, 1) != splits


def test_every_relation_has_templates_that_end_a_sentence() -> None:
    assert {relation for relation, _, _ in RELATIONS} <= ASK.keys()
    assert DESCRIBE.keys() >= REVERSIBLE
    for ask in ASK.values():
        assert len(ask.templates) > 1
        assert all(template.count("{s}") == 1 and template[-1] in "?." for template in ask.templates)
    for _, phrases in DESCRIBE.values():
        assert all("{c}" in phrase for phrase in phrases)
