"""Which factbook fields questions are about, and how short answers are read out of them.

A reader takes a field's clean text and returns the accepted answers, the one written in the text first; none
if the field does not have the plain form it knows. Fields in doubt are left out: there are enough others.
"""

from __future__ import annotations

import re
from collections.abc import Callable

FieldPath = tuple[str, str, str]
"""Section, field and label: ``("Government", "Capital", "name")``."""

_TITLES = (
    "Acting|Interim|Vice|First|Transitional|Prime|Federal|Chief|Minister|President|Chancellor|Premier|King|Queen"
    "|Emperor|Governor|Lieutenant|General|Administrator|Sultan|Amir|Prince|Sheikh|Captain|Sir|Dame|Taoiseach"
    r"|Dr\.|Gen\.|Lt\.|Col\."
)


def _name(text: str) -> tuple[str, ...]:
    """A single proper name, a bracketed variant dropped: ``Ashgabat (Ashkhabad)``."""
    match = re.fullmatch(r"([^\W\d_][^;,/(]*?)(?: \([^)]*\))?", text)
    if match is None or re.search(r"\b(in|unnamed|no|none|location|near|and|of the|more than)\b", match[1]):
        return ()
    return (match[1],) if len(match[1].split()) <= 5 else ()


def _number(text: str) -> tuple[str, ...]:
    """A leading number with its unit: ``238,533 sq km``, ``70%``, ``35,336,133``. Zero says little."""
    match = re.match(
        r"(\d[\d,.]*(?: (?:million|billion|trillion))?)((?: sq km| km| m| years)?)(?=%| \(|$| [a-z])", text
    )
    if match is None or not re.search("[1-9]", match[1]):
        return ()
    if text[match.end() :].startswith("%"):
        return (f"{match[1]}%", f"{match[1]} percent")
    return (match[1] + match[2], match[1]) if match[2] else (match[1],)


def _summit(text: str) -> tuple[str, ...]:
    match = re.match(r"([A-Z][^\d,;/(]+?) (?:\([^)]*\) )?-?\d[\d,]* m\b", text)
    return _name(match[1]) if match else ()


def _summit_height(text: str) -> tuple[str, ...]:
    match = re.match(r"[A-Z][^\d,;/]+? (\d[\d,]*) m\b", text)
    return (f"{match[1]} m", match[1], f"{match[1]} meters", f"{match[1]} metres") if match else ()


def _lowland(text: str) -> tuple[str, ...]:
    """The lowest point, unless it is a coast."""
    return () if re.search(r"(Ocean|Sea|Gulf|Sound|Channel)\b", text) else _summit(text)


def _currency(text: str) -> tuple[str, ...]:
    match = re.match(r"([^(\d,;/]+?)(?: \(([A-Z]{3})\))? per US dollar", text)
    if match is None:
        return ()
    name = match[1]
    singular = (name[:-1],) if name.endswith("s") else ()
    return (name, *singular, match[2]) if match[2] else (name, *singular)


def _independence_year(text: str) -> tuple[str, ...]:
    match = re.fullmatch(r"\d{1,2} \w+ (\d{4}) \(from [^;]*\)", text)
    return (match[1],) if match else ()


def _independence_day(text: str) -> tuple[str, ...]:
    match = re.fullmatch(r"(\d{1,2}) (\w+) (\d{4}) \(from [^;]*\)", text)
    return (f"{match[1]} {match[2]} {match[3]}", f"{match[2]} {match[1]}, {match[3]}") if match else ()


def _holiday(text: str) -> tuple[str, ...]:
    match = re.fullmatch(r"[^;,]+, (\d{1,2}) ([A-Z][a-z]+)(?: \(\d{4}\))?", text)
    return (f"{match[1]} {match[2]}", f"{match[2]} {match[1]}") if match else ()


def _anthem(text: str) -> tuple[str, ...]:
    match = re.fullmatch(r"[\"“]([^\"“”]+)[\"”](?: \(([^)]+)\))?", text)
    if match is None or len(match[1].split()) > 5:
        return ()
    return tuple(part for part in match.groups() if part)


def _person(text: str) -> tuple[str, ...]:
    """``President John Dramani MAHAMA (since …)``: the name, then the family name (in capitals)."""
    match = re.match(r"([A-Z][^,;(/]+) \(since", text)
    family = [word for word in match[1].split() if _is_family(word)] if match else []
    if match is None or not family:
        return ()
    bare = re.sub(rf"^(?:(?:{_TITLES})\s+)+", "", match[1])
    if not 2 <= len(bare.split()) <= 5 or re.search(r"\b(of|Minister)\b", bare):
        return ()
    name = " ".join(word.title() if _is_family(word) else word for word in bare.split())
    return (name, " ".join(family).title())


def _is_family(word: str) -> bool:
    """The factbook writes family names in capitals; a king's number is none."""
    return len(word) > 2 and word.isupper() and re.fullmatch("[IVX]+", word) is None


def _largest_share(text: str) -> tuple[str, ...]:
    """The first of a list with percentages: ``Akan 45.7%, …``."""
    match = re.match(r"([A-Z][^\d,;()%/]*?) (?:\([^)]*\) )?(\d[\d.]*)%", text)
    if match is None or re.search(r"\b(least|than|about|approximately|over)$", match[1]):
        return ()
    return (match[1],) if len(match[1].split()) <= 3 else ()


def _first(text: str) -> tuple[str, ...]:
    match = re.match(r"([a-z][^,;(\d]*?),", text)
    return (match[1],) if match and len(match[1].split()) <= 3 else ()


def _demonym(text: str) -> tuple[str, ...]:
    return (text,) if re.fullmatch(r"[A-Z][\w' -]{2,30}", text) else ()


def _code(text: str) -> tuple[str, ...]:
    return (text,) if re.fullmatch(r"\.?[A-Za-z0-9]{1,3}", text) else ()


def _whole(text: str) -> tuple[str, ...]:
    return (text,) if re.fullmatch(r"[A-Z][^;:()]{3,60}", text) and len(text.split()) <= 6 else ()


RELATIONS: tuple[tuple[str, FieldPath, Callable[[str], tuple[str, ...]]], ...] = (
    ("capital", ("Government", "Capital", "name"), _name),
    ("currency", ("Economy", "Exchange rates", "Currency"), _currency),
    ("domain", ("Communications", "Internet country code", "text"), _code),
    ("aircraft_prefix", ("Transportation", "Civil aircraft registration country code prefix", "text"), _code),
    ("highest_point", ("Geography", "Elevation", "highest point"), _summit),
    ("highest_elevation", ("Geography", "Elevation", "highest point"), _summit_height),
    ("lowest_point", ("Geography", "Elevation", "lowest point"), _lowland),
    ("mean_elevation", ("Geography", "Elevation", "mean elevation"), _number),
    ("coastline", ("Geography", "Coastline", "text"), _number),
    ("land_boundary", ("Geography", "Land boundaries", "total"), _number),
    ("median_age", ("People and Society", "Median age", "total"), _number),
    ("life_expectancy", ("People and Society", "Life expectancy at birth", "total population"), _number),
    ("fertility_rate", ("People and Society", "Total fertility rate", "text"), _number),
    ("birth_rate", ("People and Society", "Birth rate", "text"), _number),
    ("urban_population", ("People and Society", "Urbanization", "urban population"), _number),
    ("largest_ethnic_group", ("People and Society", "Ethnic groups", "text"), _largest_share),
    ("demonym", ("People and Society", "Nationality", "adjective"), _demonym),
    ("independence_year", ("Government", "Independence", "text"), _independence_year),
    ("independence_day", ("Government", "Independence", "text"), _independence_day),
    ("national_day", ("Government", "National holiday", "text"), _holiday),
    ("anthem", ("Government", "National anthem(s)", "title"), _anthem),
    ("long_name", ("Government", "Country name", "conventional long form"), _whole),
    ("former_name", ("Government", "Country name", "former"), _name),
    ("head_of_state", ("Government", "Executive branch", "chief of state"), _person),
    ("head_of_government", ("Government", "Executive branch", "head of government"), _person),
    ("export_commodity", ("Economy", "Exports - commodities", "text"), _first),
    ("import_commodity", ("Economy", "Imports - commodities", "text"), _first),
    ("export_partner", ("Economy", "Exports - partners", "text"), _largest_share),
    ("import_partner", ("Economy", "Imports - partners", "text"), _largest_share),
    ("airports", ("Transportation", "Airports", "text"), _number),
    ("railways", ("Transportation", "Railways", "total"), _number),
    ("internet_users", ("Communications", "Internet users", "percent of population"), _number),
)
"""Relation name, where its field stands, and how the answers are read from it."""

REVERSIBLE = frozenset(("capital", "highest_point", "anthem", "head_of_state", "former_name", "lowest_point"))
"""Relations whose value can name the country."""
