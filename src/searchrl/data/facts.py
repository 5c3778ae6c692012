"""What the two sources are turned into: passages, and facts that point at the passage stating them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True, frozen=True)
class Passage:
    """One passage of the corpus. Its id is its position in the corpus."""

    title: str
    text: str

    @property
    def contents(self) -> str:
        """The corpus form: the title in quotes on a line of its own, then the text."""
        title = self.title.replace('"', "'")
        return f'"{title}"\n{self.text}'


@dataclass(kw_only=True, slots=True, frozen=True)
class Entity:
    """What a question can be about."""

    key: str
    """Unique over both sources, for example ``country/gh`` or ``article/Accra``."""
    name: str
    """As questions call it, with its article: ``the Bahamas``."""
    kind: str
    """``country``, ``territory``, ``person``, ``work``, ``place``, … : the noun templates may use."""
    anchor: str
    """Key of the entity that decides the split: a city goes where its country goes."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Fact:
    """One answerable fact about an entity."""

    subject: Entity
    relation: str
    answers: tuple[str, ...]
    """Accepted answers; at least one stands literally in the passage."""
    passage: int


@dataclass(kw_only=True, slots=True, frozen=True)
class Link:
    """A first hop: a description that leads to another entity through one passage."""

    relation: str
    clue: str
    """What the description names: ``Accra``, ``Mount Afadjato``, ``Uncle Tom's Cabin``."""
    target: str
    """Key of the entity it leads to."""
    evidence: tuple[str, ...]
    """Strings of which one stands in the passage and gives the target away (a name or an adjective)."""
    passage: int
    source: Entity | None = None
    """The entity the passage is about, if it is not the target itself."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Source:
    """What one source yields. Passage numbers in facts and links count from the source's first passage."""

    passages: list[Passage]
    facts: list[Fact]
    links: list[Link]
