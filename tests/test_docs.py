"""The documentation: the site builds without a warning, links lead somewhere, quoted messages exist."""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from myst_parser.mdit_to_docutils.base import default_slugify

from example import ROOT
from searchrl.compose import load_config
from searchrl.config import Config, ConfigError
from searchrl.config.reference import known_keys
from searchrl.data.readers import read_examples
from searchrl.trajectory import Example, Finish, Outcome, Trajectory, Turn
from test_readme import FLAGS

DOCS = ROOT / "docs"
PAGES = [*DOCS.rglob("*.md"), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]


def build(source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """As `make docs` does it."""
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-b",
        "html",
        str(source),
        str(out),
    ]
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, check=False
    )


@pytest.mark.integration
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    built = build(DOCS, tmp_path)
    assert built.stdout == ""
    assert built.returncode == 0
    pages = {page.relative_to(DOCS).with_suffix(".html") for page in DOCS.rglob("*.md")}
    assert [page for page in pages if not (tmp_path / page).is_file()] == []


@pytest.mark.integration
@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("[a](no.md) [b](#no) [c](other.md#no)", ["'no.md'", "'no' [myst.", "in doc 'other': 'no'"]),
        ("[a](../no.py)", ["docs/index.md links to ../no.py, which does not exist"]),
    ],
)
def test_a_link_that_leads_nowhere_fails_the_build(tmp_path: Path, text: str, faults: list[str]) -> None:
    (tmp_path / "docs").mkdir()
    shutil.copy(DOCS / "conf.py", tmp_path / "docs")
    (tmp_path / "docs" / "index.md").write_text(f"# Index\n\n{text}\n\n```{{toctree}}\nother\n```\n")
    (tmp_path / "docs" / "other.md").write_text("# Other\n\n[back](index.md#index)\n")
    built = build(tmp_path / "docs", tmp_path / "site")
    assert built.returncode != 0
    assert [fault for fault in faults if fault not in built.stdout] == [], built.stdout


def anchors(page: Path) -> set[str]:
    """What a code host makes of the page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return {default_slugify(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(page: Path) -> None:
    """Where a code host shows it, and so for files that have no page on the site too."""
    for target in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


# --- messages that are quoted -----------------------------------------------------------------------------


def literals() -> list[str]:
    """Every text in the source, with ``…`` where a value goes."""
    found: list[str] = []
    for file in (ROOT / "src" / "searchrl").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def quoted() -> list[str]:
    """Messages in the first column of troubleshooting.md, but for those of libraries."""
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8").partition("## Libraries' messages")[0]
    return re.findall(r"^\| `([^`]* [^`]*)` \|", page, re.MULTILINE)


LITERALS = "\0".join(literals())


@pytest.mark.parametrize("message", quoted())
def test_a_quoted_message_stands_in_the_source(message: str) -> None:
    """Each part of it between values."""
    parts = [part.strip() for part in message.split("…") if len(part.strip()) > 2]
    assert parts
    assert [part for part in parts if part not in LITERALS] == []


def test_messages_are_quoted_and_a_wrong_one_is_noticed() -> None:
    assert len(quoted()) > 40
    assert "holds a run already" in LITERALS
    assert "holds a run since" not in LITERALS


# --- commands and settings --------------------------------------------------------------------------------


def commands(page: str) -> list[str]:
    """The indented lines of a page that are commands, continued lines joined, without their comments."""
    text = (DOCS / page).read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^ {4}((?:searchrl|python) .*)$", text, re.MULTILINE)
    return [re.sub(r"  +#.*", "", line) for line in lines]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


WRITTEN = [
    (page, command) for page in ("tutorial.md", "extending.md", "migration.md") for command in commands(page)
]
MISTAKES = {
    "grop_size=4": "did you mean 'group_size'",
    "group_size=1": "group_size=1 leaves nothing to compare",
}
"""What the tutorial gets wrong on purpose, and what comes of it."""


@pytest.fixture
def workplace(shipped_files: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with what the pages' commands need: the examples, code of the pages, files of questions."""
    (shipped_files / "examples").symlink_to(ROOT / "examples")
    (shipped_files / "mine.py").write_text("\n".join(blocks("extending.md", "python")), encoding="utf-8")
    for file in ("sums/train.jsonl", "sums/test.jsonl"):
        (shipped_files / "assets" / file).parent.mkdir(exist_ok=True)
        (shipped_files / "assets" / file).touch()
    for file in ("notes/train.jsonl", "notes/test.jsonl", "notes/corpus.jsonl", "notes/bm25/manifest.json"):
        (shipped_files / file).parent.mkdir(parents=True, exist_ok=True)
        (shipped_files / file).touch()
    monkeypatch.syspath_prepend(shipped_files)
    for module in ("mine", "examples"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    yield shipped_files
    for module in [name for name in sys.modules if name.partition(".")[0] in ("mine", "examples")]:
        del sys.modules[module]  # of this folder


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize(("page", "command"), WRITTEN)
def test_every_command_is_one(page: str, command: str) -> None:
    program, first, *words = shlex.split(command)
    if program == "python":
        assert first == "-m"
        assert importlib.util.find_spec(words[0]) is not None
    elif first in FLAGS:
        FLAGS[first]().parse_args(words)
    elif first in ("train", "eval", "validate", "doctor"):
        # The checkpoints are those of runs that the reader has made.
        overrides = [
            re.sub("^checkpoint=.*", "checkpoint=random:tiny", word)
            for word in words
            if not word.startswith("--")
        ]
        if mistakes := [MISTAKES[word] for word in overrides if word in MISTAKES]:
            with pytest.raises(ConfigError, match=mistakes[0]):
                load_config(overrides)
        elif overrides:
            load_config(overrides, training=first != "eval")
    else:
        assert first in {"report", "play", "config"}


@pytest.mark.parametrize("page", ["tutorial.md", "extending.md", "migration.md", "troubleshooting.md"])
def test_every_setting_that_a_page_names_exists(page: str) -> None:
    """`section.key`, alone or with a value, several in one code span too."""
    known, sections = set(known_keys()), {entry.name for entry in fields(Config)}
    spans = re.findall(r"`([^`\n]+)`", (DOCS / page).read_text(encoding="utf-8"))
    ours = [span for span in spans if not span.startswith("-")]
    names = {
        name for span in ours for name in re.findall(r"(?:^|\s)\+?([a-z_]+\.[a-z_.0-9]+)(?==|\s|$)", span)
    }
    named = {name for name in names if name.partition(".")[0] in sections and ".kwargs." not in name}
    assert named - known == set()
    assert named or page == "tutorial.md"


def test_the_code_of_a_page_runs(workplace: Path) -> None:
    mine = runpy.run_path(str(workplace / "mine.py"))
    (document,) = asyncio.run(mine["Echo"]().search("hello", 3))
    assert (document.title, document.text) == ("Echo", "You said hello.")
    turn = Turn(token_ids=[2, 3], logprobs=[-1.0, -1.0], text="", finish=Finish.STOP, policy_version=0)
    trajectory = Trajectory(prompt_ids=[1], turns=[turn], outcome=Outcome.ANSWERED, answer="Rome")
    example = Example(id="q", question="?", golden_answers=("Rome",), data_source="t")
    assert mine["brief"](trajectory, example, cost=0.001) == 0.998


def test_the_rows_of_a_page_are_questions(workplace: Path) -> None:
    (rows,) = blocks("extending.md", "json")
    (workplace / "rows.jsonl").write_text(rows, encoding="utf-8")
    assert len(read_examples(workplace / "rows.jsonl")) == 2
