"""``searchrl data prepare``: published question sets as one file of our rows, with a manifest beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from searchrl.console import Console
from searchrl.data.errors import DataError
from searchrl.data.files import replacing, sha256
from searchrl.data.flashrag import SPLITS, locate, published, to_row
from searchrl.data.rows import Row, jsonl_rows
from searchrl.data.sampler import shuffled

FORMAT = 1
"""Raised whenever the same files give other rows."""
FORMS = ("jsonl", "parquet")


@dataclass(kw_only=True, slots=True)
class SourceFile:
    """One file that was read."""

    source: str
    file: str
    """Its name in the collection, ``nq/test.jsonl``."""
    sha256: str
    rows: int
    published_rows: int
    """How many rows the file is known to have; another number was warned about."""
    blank_answers: int
    """Answers without a character in them, which were left out of their rows."""


@dataclass(kw_only=True, slots=True)
class PreparedManifest:
    """What a prepared file consists of. ``SPLIT.manifest.json`` holds exactly this."""

    format: int
    split: str
    form: str
    seed: int | None
    """What the training rows were shuffled by; None: they are in the order of their files."""
    sources: list[SourceFile]
    output: str
    rows: int
    sha256: str


@dataclass(kw_only=True, slots=True, frozen=True)
class _Input:
    source: str
    split: str
    """As the set calls it."""
    rows: int
    path: Path
    sha256: str


def prepare(
    split: str,
    sources: Sequence[str],
    out: Path,
    *,
    origin: str,
    form: str = "jsonl",
    seed: int = 0,
    console: Console,
) -> PreparedManifest:
    """Write ``out/SPLIT.jsonl`` (or ``.parquet``) and its manifest, unless they are there and whole.

    Training rows are shuffled by ``seed``; test rows keep the order of ``sources`` and files, and none is
    dropped. ``origin`` is ``hub`` or a folder laid out like it. A number of rows that is not the published
    one is said and recorded, no error: published sets get corrected.

    Raises ``DataError`` for a request that cannot be met, a file that cannot be had, a bad row, or a file in
    the way that this command did not write.
    """
    _check_request(split, sources, form, seed)
    output, manifest_path = out / f"{split}.{form}", out / f"{split}.manifest.json"
    _check_place(output, manifest_path)
    inputs = [_input(source, split, origin) for source in sources]
    order_seed = seed if split == "train" else None
    existing = _read_manifest(manifest_path)
    if existing is not None:
        changed = _changed(existing, inputs, form, order_seed, output)
        if not changed:
            console.say(f"{output} is complete: kept")
            _report(existing, console)
            return existing
        console.say(f"{output} is made anew: {changed}")
    files, rows = [], []
    for item in inputs:
        file, rows_there = _read(item, console)
        files.append(file)
        rows += rows_there
    if order_seed is not None:
        rows = [rows[index] for index in shuffled(len(rows), order_seed)]
    with replacing(output) as fresh:
        _write(rows, fresh, form)
        manifest = PreparedManifest(
            format=FORMAT,
            split=split,
            form=form,
            seed=order_seed,
            sources=files,
            output=output.name,
            rows=len(rows),
            sha256=sha256(fresh),
        )
        # The manifest takes its place first: what an interruption leaves is then known to be ours, not whole.
        with replacing(manifest_path) as fresh_manifest:
            fresh_manifest.write_text(json.dumps(asdict(manifest), indent=1) + "\n", encoding="utf-8")
    console.say(f"{output} is written")
    _report(manifest, console)
    return manifest


def _check_request(split: str, sources: Sequence[str], form: str, seed: int) -> None:
    """Refuse what cannot be prepared, before anything is downloaded."""
    if split not in SPLITS:
        raise DataError(f"no split is called {split!r}; there are {', '.join(SPLITS)}")
    if form not in FORMS:
        raise DataError(f"no format is called {form!r}; there are {', '.join(FORMS)}")
    if seed < 0:
        raise DataError(f"seed {seed} is negative; choose one from 0 up")
    if not sources or len(set(sources)) < len(sources):
        raise DataError(f"--sources {','.join(sources)!r} must name at least one set, and each once")
    for source in sources:
        published(source, split)


def _check_place(output: Path, manifest_path: Path) -> None:
    """Make the folder; refuse to replace a file that somebody else put there."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"--out {output.parent} cannot be a folder ({error.strerror}); choose another"
        ) from error
    if output.exists() and not manifest_path.exists():
        raise DataError(
            f"{output} is in the way and was not prepared here (no {manifest_path.name} beside it); move it, "
            "or choose another --out"
        )


def _input(source: str, split: str, origin: str) -> _Input:
    published_split, rows = published(source, split)
    path = locate(source, published_split, origin)
    return _Input(source=source, split=published_split, rows=rows, path=path, sha256=sha256(path))


def _read(item: _Input, console: Console) -> tuple[SourceFile, list[Row]]:
    """All rows of one file, in our form and its order."""
    rows: list[Row] = []
    blank = 0
    with console.progress(f"reading {item.source}", total=item.rows) as advance:
        for place, row in jsonl_rows(item.path):
            converted, left_out = to_row(item.source, item.split, len(rows), row, f"{item.path}, {place}")
            rows.append(converted)
            blank += left_out
            advance(place)
    if not rows:
        raise DataError(f"{item.path} holds no rows; download it again")
    file = SourceFile(
        source=item.source,
        file=f"{item.source}/{item.split}.jsonl",
        sha256=item.sha256,
        rows=len(rows),
        published_rows=item.rows,
        blank_answers=blank,
    )
    return file, rows


def _write(rows: list[Row], path: Path, form: str) -> None:
    if form == "parquet":
        _write_parquet(rows, path)
    else:
        with path.open("wb") as file:
            file.writelines(_json(row, row) + b"\n" for row in rows)


def _write_parquet(rows: list[Row], path: Path) -> None:
    """Metadata goes in as JSON text: the sets have different metadata, and a column has one type."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.string()
    schema = pa.schema(
        [
            ("id", text),
            ("question", text),
            ("golden_answers", pa.list_(text)),
            ("data_source", text),
            ("metadata", text),
        ]
    )
    flat = [row | {"metadata": _json(row["metadata"], row).decode()} for row in rows]
    pq.write_table(pa.Table.from_pylist(flat, schema=schema), path)


def _json(value: object, row: Row) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{row['id']}: its metadata holds half a surrogate pair ({error.reason}); repair the source"
        ) from error


def _read_manifest(path: Path) -> PreparedManifest | None:
    """The manifest of an earlier call; None: there is none, or none that can be read."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["sources"] = [SourceFile(**file) for file in content["sources"]]
        return PreparedManifest(**content)
    except (ValueError, TypeError, KeyError):
        return None


def _changed(
    manifest: PreparedManifest, inputs: list[_Input], form: str, seed: int | None, output: Path
) -> str:
    """Why an earlier output cannot be kept; empty: it can."""
    if manifest.format != FORMAT:
        return "its manifest is of another version"
    if (manifest.form, manifest.seed) != (form, seed):
        return f"the last one had format {manifest.form} and seed {manifest.seed}"
    if [file.source for file in manifest.sources] != [item.source for item in inputs]:
        return f"the last one had {', '.join(file.source for file in manifest.sources)}"
    if other := [
        file.file for file, item in zip(manifest.sources, inputs, strict=True) if file.sha256 != item.sha256
    ]:
        return f"{', '.join(other)} changed"
    if not output.is_file() or sha256(output) != manifest.sha256:
        return "it is missing or not what its manifest says"
    return ""


def _report(manifest: PreparedManifest, console: Console) -> None:
    """The numbers of rows beside the published ones, and a warning for each that differs."""
    columns = ("source", "file", "rows", "published")
    console.table(
        f"{manifest.split}: {manifest.rows:,} rows",
        columns,
        [(file.source, file.file, f"{file.rows:,}", f"{file.published_rows:,}") for file in manifest.sources],
    )
    for file in manifest.sources:
        if file.rows != file.published_rows:
            console.say(
                f"warning: {file.file} has {file.rows:,} rows, published are {file.published_rows:,}: it is "
                "not whole, or was corrected"
            )
        if file.blank_answers:
            console.say(f"{file.file}: {file.blank_answers:,} blank answers, which match nothing, left out")
