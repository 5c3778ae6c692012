"""How relations are asked for, and how a first hop describes what it leads to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True, frozen=True)
class Ask:
    """How a relation is asked for; ``{s}`` stands for the subject."""

    query: str
    """Words for a search query, after the subject's name."""
    templates: tuple[str, ...]


ASK: dict[str, Ask] = {
    "capital": Ask(
        query="capital",
        templates=(
            "What is the capital of {s}?",
            "Which city is the capital of {s}?",
            "Name the capital of {s}.",
        ),
    ),
    "currency": Ask(
        query="currency",
        templates=(
            "What is the currency of {s}?",
            "Which currency is used in {s}?",
            "What currency do people pay with in {s}?",
        ),
    ),
    "domain": Ask(
        query="Internet country code",
        templates=(
            "What is the Internet country code of {s}?",
            "Which Internet country code belongs to {s}?",
        ),
    ),
    "aircraft_prefix": Ask(
        query="civil aircraft registration country code prefix",
        templates=(
            "What is the civil aircraft registration prefix of {s}?",
            "Which registration code prefix marks civil aircraft from {s}?",
        ),
    ),
    "highest_point": Ask(
        query="highest point",
        templates=("What is the highest point of {s}?", "What is the name of the highest point in {s}?"),
    ),
    "highest_elevation": Ask(
        query="highest point",
        templates=(
            "How high is the highest point of {s}?",
            "What is the elevation of the highest point in {s}?",
        ),
    ),
    "lowest_point": Ask(
        query="lowest point",
        templates=("What is the lowest point of {s}?", "What is the name of the lowest point in {s}?"),
    ),
    "mean_elevation": Ask(
        query="mean elevation",
        templates=("What is the mean elevation of {s}?", "How high is the mean elevation of {s}?"),
    ),
    "coastline": Ask(
        query="coastline",
        templates=("How long is the coastline of {s}?", "What is the length of the coastline of {s}?"),
    ),
    "land_boundary": Ask(
        query="land boundaries",
        templates=(
            "What is the total length of the land boundaries of {s}?",
            "How long in total are the land boundaries of {s}?",
        ),
    ),
    "median_age": Ask(
        query="median age",
        templates=("What is the median age in {s}?", "What is the median age of the people of {s}?"),
    ),
    "life_expectancy": Ask(
        query="life expectancy at birth",
        templates=(
            "What is the life expectancy at birth in {s}?",
            "How high is the life expectancy at birth in {s}?",
        ),
    ),
    "fertility_rate": Ask(
        query="total fertility rate",
        templates=(
            "What is the total fertility rate of {s}?",
            "How high is the total fertility rate in {s}?",
        ),
    ),
    "birth_rate": Ask(
        query="birth rate",
        templates=(
            "What is the birth rate per 1,000 population in {s}?",
            "How many births per 1,000 population are there in {s}?",
        ),
    ),
    "urban_population": Ask(
        query="urban population",
        templates=(
            "What percentage of the population is urban in {s}?",
            "How large is the urban population, in percent, in {s}?",
        ),
    ),
    "largest_ethnic_group": Ask(
        query="ethnic groups",
        templates=(
            "What is the largest of the ethnic groups of {s}?",
            "Which of the ethnic groups in {s} is the largest?",
        ),
    ),
    "demonym": Ask(
        query="nationality adjective",
        templates=(
            "Which adjective describes the nationality of people from {s}?",
            "What is the nationality adjective for {s}?",
        ),
    ),
    "independence_year": Ask(
        query="independence",
        templates=(
            "In which year did {s} gain independence?",
            "What is the year of the independence of {s}?",
        ),
    ),
    "independence_day": Ask(
        query="independence",
        templates=(
            "On which date did {s} gain independence?",
            "What is the date of the independence of {s}?",
        ),
    ),
    "national_day": Ask(
        query="national holiday",
        templates=(
            "On which day is the national holiday of {s}?",
            "What is the date of the national holiday of {s}?",
        ),
    ),
    "anthem": Ask(
        query="national anthem title",
        templates=(
            "What is the title of the national anthem of {s}?",
            "Which song is the national anthem of {s}?",
        ),
    ),
    "long_name": Ask(
        query="conventional long form country name",
        templates=(
            "What is the conventional long form of the country name of {s}?",
            "What is the full official country name of {s}?",
        ),
    ),
    "former_name": Ask(
        query="former country name",
        templates=("What was the former name of {s}?", "What is the former country name of {s}?"),
    ),
    "head_of_state": Ask(
        query="chief of state",
        templates=("Who is the chief of state of {s}?", "Who is chief of state in {s}?"),
    ),
    "head_of_government": Ask(
        query="head of government",
        templates=("Who is the head of government of {s}?", "Who is head of government in {s}?"),
    ),
    "export_commodity": Ask(
        query="exports commodities",
        templates=(
            "Which is the most valuable of the export commodities of {s}?",
            "What comes first among the exports commodities of {s}?",
        ),
    ),
    "import_commodity": Ask(
        query="imports commodities",
        templates=(
            "Which is the most valuable of the import commodities of {s}?",
            "What comes first among the imports commodities of {s}?",
        ),
    ),
    "export_partner": Ask(
        query="exports partners",
        templates=(
            "Which is the largest of the export partners of {s}?",
            "Who takes the largest share among the exports partners of {s}?",
        ),
    ),
    "import_partner": Ask(
        query="imports partners",
        templates=(
            "Which is the largest of the import partners of {s}?",
            "Who has the largest share among the imports partners of {s}?",
        ),
    ),
    "airports": Ask(
        query="airports",
        templates=("How many airports are there in {s}?", "What is the number of airports in {s}?"),
    ),
    "railways": Ask(
        query="railways",
        templates=(
            "What is the total length of the railways of {s}?",
            "How long in total are the railways in {s}?",
        ),
    ),
    "internet_users": Ask(
        query="internet users percent of population",
        templates=(
            "What percent of the population are Internet users in {s}?",
            "Internet users make up what percent of the population of {s}?",
        ),
    ),
    "birth_year": Ask(
        query="born", templates=("In which year was {s} born?", "What is the year of birth of {s}?")
    ),
    "death_year": Ask(
        query="died", templates=("In which year did {s} die?", "What is the year of death of {s}?")
    ),
    "reign_start": Ask(
        query="from",
        templates=("From which year on was {s} in office?", "In which year did {s} come to power?"),
    ),
    "reign_end": Ask(
        query="until",
        templates=("Until which year was {s} in office?", "In which year did the rule of {s} end?"),
    ),
    "nationality": Ask(
        query="nationality", templates=("What is the nationality of {s}?", "What nationality was {s}?")
    ),
    "atomic_number": Ask(
        query="chemical element atomic number",
        templates=(
            "What is the atomic number of {s}?",
            "Which atomic number does the chemical element {s} have?",
        ),
    ),
    "symbol": Ask(
        query="chemical element symbol",
        templates=("What is the chemical symbol of {s}?", "Which symbol does the chemical element {s} have?"),
    ),
    "family": Ask(
        query="family",
        templates=("To which family does {s} belong?", "In which biological family is {s}?"),
    ),
    "author": Ask(query="by author", templates=('Who wrote "{s}"?', 'Who is the author of "{s}"?')),
    "director": Ask(
        query="film directed by", templates=('Who directed the film "{s}"?', 'Who is the director of "{s}"?')
    ),
    "composer": Ask(query="composed by", templates=('Who composed "{s}"?', 'Who is the composer of "{s}"?')),
    "painter": Ask(query="painting by", templates=('Who painted "{s}"?', 'Who is the painter of "{s}"?')),
    "work_year": Ask(
        query="year", templates=('From which year is "{s}"?', 'In which year did "{s}" appear?')
    ),
    "film_year": Ask(
        query="film year",
        templates=('From which year is the film "{s}"?', 'In which year did the film "{s}" come out?'),
    ),
    "country": Ask(
        query="country", templates=("In which country is {s}?", "In which country is {s} located?")
    ),
}
"""Templates of every relation that can be asked for."""

DESCRIBE: dict[str, tuple[str, tuple[str, ...]]] = {
    "capital": ("capital", ("the {kind} whose capital is {c}", "the {kind} that has {c} as its capital")),
    "highest_point": (
        "highest point",
        ("the {kind} whose highest point is {c}", "the {kind} where {c} is the highest point"),
    ),
    "lowest_point": (
        "lowest point",
        ("the {kind} whose lowest point is {c}", "the {kind} where {c} is the lowest point"),
    ),
    "anthem": (
        "national anthem",
        ('the {kind} whose national anthem is "{c}"', 'the {kind} with the national anthem "{c}"'),
    ),
    "head_of_state": (
        "chief of state",
        ("the {kind} whose chief of state is {c}", "the {kind} where {c} is chief of state"),
    ),
    "former_name": (
        "former name",
        ("the {kind} formerly known as {c}", "the {kind} that was once named {c}"),
    ),
    "country": ("country", ("the country where {c} is located", "the country in which {c} lies")),
    "home": ("nationality", ("the country that {c} came from", "the home country of {c}")),
    "author": ("author", ('the author of "{c}"', 'the writer of "{c}"')),
    "director": ("film director", ('the director of "{c}"', 'the director of the film "{c}"')),
    "composer": ("composer", ('the composer of "{c}"',)),
    "painter": ("painter", ('the painter of "{c}"',)),
}
"""Of every link relation: words for the first hop's query, and phrases that describe the target.

``{c}`` stands for the link's clue, ``{kind}`` for the target's noun.
"""
