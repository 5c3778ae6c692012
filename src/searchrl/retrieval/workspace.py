"""The folder that an index grows in, beside its target, which appears complete or not at all."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from searchrl.retrieval.manifest import BuildError
from searchrl.retrieval.progress import say


@contextmanager
def workspace(directory: Path, key: Mapping[str, object]) -> Iterator[Path]:
    """Yield the folder ``.NAME.partial`` beside ``directory``, for one process at a time.

    What an earlier attempt with the same ``key`` finished is still there, except the folder ``index``, which
    is made anew. After success the folder is deleted; after a failure it stays if anything was finished,
    which the body tells by a file that ends in ``.shards`` or ``.parts``. A file ``moved`` says that it holds
    the only copy of something, which is never deleted.
    """
    work = directory.with_name(f".{directory.name}.partial")
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BuildError(f"another process is making {directory}: wait for it, or end it") from None
        _start(work, key)
        try:
            yield work
        except BaseException:
            shutil.rmtree(work / "index", ignore_errors=True)
            if not any(path.suffix in (".shards", ".parts") for path in work.iterdir()):
                shutil.rmtree(work)
            raise
        shutil.rmtree(work)


def _start(work: Path, key: Mapping[str, object]) -> None:
    """Empty the folder of what does not belong to ``key``."""
    note = work / "key.json"
    if note.exists() and json.loads(note.read_text() or "null") != key:
        if (work / "moved").exists():
            raise BuildError(
                f"{work} holds index parts that another `searchrl index import --move` put there: run that "
                "again, or move them to where you want them"
            )
        say(f"discarding what another build left in {work}")
        for path in work.iterdir():
            if path.is_file() and path.name != "lock":
                path.unlink()
    note.write_text(json.dumps(key))
    shutil.rmtree(work / "index", ignore_errors=True)
