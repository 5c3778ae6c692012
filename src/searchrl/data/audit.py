"""Can a corpus answer the questions? Which share of their gold answers occurs in it at all.

That an answer occurs is necessary, not sufficient: the passage that has it may say something else, and a
question of several hops needs the other facts too. The share is an upper bound of what search can find.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from searchrl.answers import normalize
from searchrl.data.errors import DataError
from searchrl.data.files import replacing
from searchrl.data.occurrence import search_corpus
from searchrl.trajectory import Example

COLUMNS = ("questions", "n", "yes/no", "empty", "answerable", "unanswerable", "share")
"""Of `table`; ``share`` is answerable / (answerable + unanswerable)."""

_SHOWN = 5


class Verdict(StrEnum):
    """What a corpus has for a question."""

    ANSWERABLE = "answerable"
    """One of its gold answers occurs."""
    UNANSWERABLE = "unanswerable"
    YES_NO = "yes_no"
    """A gold answer is yes or no: both words occur everywhere, which says nothing."""
    EMPTY = "empty"
    """Nothing is left of any gold answer once normalised ("The The"): no answer can ever be right."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Audit:
    """The verdict on every question."""

    examples: Sequence[Example]
    verdicts: Sequence[Verdict]
    """One for each of ``examples``."""
    passages: int
    """How many the corpus has."""

    def having(self, verdict: Verdict) -> dict[str, list[Example]]:
        """The questions with this verdict, by data source."""
        found: dict[str, list[Example]] = defaultdict(list)
        for example, own in zip(self.examples, self.verdicts, strict=True):
            if own is verdict:
                found[example.data_source].append(example)
        return dict(found)


def audit(
    examples: Sequence[Example],
    corpus: Path,
    *,
    workers: int,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> Audit:
    """Search a corpus for every gold answer; arguments and errors as `occurrence.search_corpus`."""
    golds = {gold for example in examples for gold in example.golden_answers}
    search = search_corpus(golds, corpus, workers=workers, on_bytes=on_bytes)
    verdicts = [_verdict(example, search.answers) for example in examples]
    return Audit(examples=examples, verdicts=verdicts, passages=search.passages)


def _verdict(example: Example, occurring: frozenset[str]) -> Verdict:
    golds = {normalize(gold) for gold in example.golden_answers} - {""}
    if not golds:
        return Verdict.EMPTY
    if golds & {"yes", "no"}:
        return Verdict.YES_NO
    return Verdict.UNANSWERABLE if golds.isdisjoint(occurring) else Verdict.ANSWERABLE


@dataclass(kw_only=True, slots=True, frozen=True)
class Part:
    """The counts of some of the questions."""

    source: str | None
    """None: all questions."""
    hops: int | None
    """None: any number."""
    questions: int
    yes_no: int
    empty: int
    answerable: int
    unanswerable: int
    share: float | None
    """Answerable among those that are one or the other; None if there are none."""


def parts(audit: Audit) -> list[Part]:
    """Every data source, followed by its hop counts where its questions have them; all questions last."""
    groups: dict[tuple[str | None, int | None], Counter[Verdict]] = defaultdict(Counter)
    for example, verdict in zip(audit.examples, audit.verdicts, strict=True):
        groups[None, None][verdict] += 1
        groups[example.data_source, None][verdict] += 1
        if example.hops:
            groups[example.data_source, example.hops][verdict] += 1
    order = sorted(groups, key=lambda key: (key[0] is None, key[0] or "", key[1] or 0))
    return [_part(source, hops, groups[source, hops]) for source, hops in order]


def _part(source: str | None, hops: int | None, counts: Counter[Verdict]) -> Part:
    answerable, unanswerable = counts[Verdict.ANSWERABLE], counts[Verdict.UNANSWERABLE]
    judged = answerable + unanswerable
    return Part(
        source=source,
        hops=hops,
        questions=counts.total(),
        yes_no=counts[Verdict.YES_NO],
        empty=counts[Verdict.EMPTY],
        answerable=answerable,
        unanswerable=unanswerable,
        share=answerable / judged if judged else None,
    )


def table(audit: Audit) -> list[list[str]]:
    """`parts` as rows of `COLUMNS`."""
    rows = []
    for part in parts(audit):
        name = "all" if part.source is None else part.source
        if part.hops is not None:
            name += f", {part.hops} hop{'s' if part.hops > 1 else ''}"
        counts = (part.questions, part.yes_no, part.empty, part.answerable, part.unanswerable)
        share = "n/a" if part.share is None else f"{part.share:.3f}"
        rows.append([name, *(f"{count:,}" for count in counts), share])
    return rows


def write_report(audit: Audit, folder: Path, *, questions: Path, corpus: Path) -> None:
    """Write ``audit.json`` (counts, ids of all unanswerable and empty questions) and ``audit.md``.

    An earlier report is replaced. Raises ``DataError`` if the folder cannot be written to.
    """
    unanswerable, empty = audit.having(Verdict.UNANSWERABLE), audit.having(Verdict.EMPTY)
    report = {
        "questions": str(questions),
        "corpus": str(corpus),
        "passages": audit.passages,
        "parts": [asdict(part) for part in parts(audit)],
        "unanswerable": {source: [each.id for each in found] for source, found in unanswerable.items()},
        "empty": {source: [each.id for each in found] for source, found in empty.items()},
        "examples": {
            source: [
                {"id": each.id, "question": each.question, "golden_answers": each.golden_answers}
                for each in found[:_SHOWN]
            ]
            for source, found in unanswerable.items()
        },
    }
    _write_whole(folder / "audit.json", json.dumps(report, indent=1) + "\n")
    lines = [
        "# Can the corpus answer the questions?",
        "",
        f"`{questions}` against the {audit.passages:,} passages of `{corpus}`.",
        "A question is answerable if one of its gold answers occurs in a passage.",
        "Where the answer is yes, no or empty once normalised, that says nothing: the share leaves it out.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
        *("| " + " | ".join(row) + " |" for row in table(audit)),
    ]
    for source, found in unanswerable.items():
        lines += ["", f"Unanswerable, for example, of {source}:", ""]
        lines += [f"- {_one_line(each)}" for each in found[:_SHOWN]]
    _write_whole(folder / "audit.md", "\n".join(lines) + "\n")


def _one_line(example: Example) -> str:
    return " ".join(f"{example.question} ({'; '.join(example.golden_answers)})".split())


def write_answerable(audit: Audit, questions: Path, out: Path) -> int:
    """Write the rows of ``questions`` that are answerable or yes/no to ``out``, and return how many.

    Rows of JSON lines stay as they are, in their order; those of Parquet become JSON lines of our own form.
    Raises ``DataError`` if none is left, or if ``out`` cannot be written.
    """
    kept = [
        row
        for row, verdict in zip(_rows(questions, audit.examples), audit.verdicts, strict=True)
        if verdict in (Verdict.ANSWERABLE, Verdict.YES_NO)
    ]
    if not kept:
        raise DataError(
            f"no question of {questions} is answerable, {out} is not written: is it the right corpus?"
        )
    _write_whole(out, "".join(f"{row}\n" for row in kept))
    return len(kept)


def _rows(questions: Path, examples: Sequence[Example]) -> list[str]:
    """The rows as JSON, one for each example."""
    if questions.suffix == ".parquet":
        rows = ({k: v for k, v in asdict(example).items() if v is not None} for example in examples)
        return [json.dumps(row, ensure_ascii=False) for row in rows]
    with gzip.open(questions, "rb") if questions.suffix == ".gz" else questions.open("rb") as file:
        return [line.decode().rstrip("\r\n") for line in file if line.strip()]


def make_folder(path: Path) -> None:
    """Make a folder for results, unless it is there. Raises ``DataError`` if that is impossible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"no results can be written to {path} ({error}): name another place") from error


def _write_whole(path: Path, text: str) -> None:
    try:
        with replacing(path) as fresh:
            fresh.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise DataError(f"cannot write {path} ({error}): name another place") from error
