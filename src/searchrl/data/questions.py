"""Questions by template over facts and links. A two-hop question describes its subject by a link."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from searchrl.data.errors import DataError
from searchrl.data.facts import Fact, Link, Passage
from searchrl.data.templates import ASK, DESCRIBE
from searchrl.data.text import choose, contains, normalize


@dataclass(kw_only=True, slots=True, frozen=True)
class Question:
    """One question with all that is known of it."""

    text: str
    answers: tuple[str, ...]
    relation: str
    """``capital`` or, for two hops, ``anthem>capital``."""
    passages: tuple[int, ...]
    """Passages that state the facts, in hop order."""
    queries: tuple[str, ...]
    """One search query per hop that leads to the passage."""
    bridge: str | None
    """The intermediate answer of a two-hop question."""
    anchors: tuple[str, ...]
    """Entities that must all lie in the question's split."""

    @property
    def hops(self) -> int:
        """1 or 2."""
        return len(self.passages)


def one_hop(facts: Iterable[Fact]) -> Iterator[Question]:
    """One question per fact."""
    for fact in facts:
        ask = ASK[fact.relation]
        template = choose(ask.templates, "one_hop", fact.relation, fact.subject.key)
        yield Question(
            text=template.format(s=fact.subject.name),
            answers=fact.answers,
            relation=fact.relation,
            passages=(fact.passage,),
            queries=(f"{_bare(fact.subject.name)} {ask.query}",),
            bridge=None,
            anchors=(fact.subject.anchor,),
        )


def two_hops(facts: Iterable[Fact], links: Iterable[Link]) -> Iterator[Question]:
    """One question per link and fact of the link's target, where the two say different things."""
    by_subject: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts:
        by_subject[fact.subject.key].append(fact)
    for link in links:
        hint, phrases = DESCRIBE[link.relation]
        for fact in by_subject[link.target]:
            if fact.relation == link.relation or fact.passage == link.passage:
                continue
            phrase = choose(phrases, "phrase", link.relation, link.clue, fact.relation)
            described = phrase.format(kind=fact.subject.kind, c=link.clue)
            ask = ASK[fact.relation]
            template = choose(ask.templates, "two_hops", link.relation, link.clue, fact.relation)
            bridge = _bare(fact.subject.name)
            anchors = (fact.subject.anchor, link.source.anchor) if link.source else (fact.subject.anchor,)
            yield Question(
                text=template.format(s=described),
                answers=fact.answers,
                relation=f"{link.relation}>{fact.relation}",
                passages=(link.passage, fact.passage),
                queries=(f"{link.clue} {hint}", f"{bridge} {ask.query}"),
                bridge=bridge,
                anchors=anchors,
            )


def sound(questions: Iterable[Question], passages: list[Passage]) -> list[Question]:
    """Drop questions that give an answer away, that have two different answers, or that repeat a text."""
    by_text: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        for_bridge = [question.bridge] if question.bridge else []
        if any(contains(question.text, given) for given in [*question.answers, *for_bridge]):
            continue
        if question.bridge and any(
            normalize(question.bridge) == normalize(answer) for answer in question.answers
        ):
            continue
        text = passages[question.passages[-1]].text
        if not any(contains(text, answer) for answer in question.answers):
            raise DataError(
                f"no answer of {question} stands in its passage {text!r}: a relation is read wrongly"
            )
        by_text[normalize(question.text)].append(question)
    kept = []
    for same in by_text.values():
        if len({tuple(map(normalize, question.answers)) for question in same}) == 1:
            kept.append(same[0])
    return kept


def _bare(name: str) -> str:
    return name.removeprefix("the ")
