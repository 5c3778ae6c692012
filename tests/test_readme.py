"""The README tells the truth: its commands parse, its files and functions exist, its tree is complete."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from example import touch_models
from searchrl import play
from searchrl.cli import main
from searchrl.compose import load_config
from searchrl.config import ConfigError
from searchrl.data import data_cli
from searchrl.report import command
from searchrl.retrieval import index_cli, server

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SETTINGS = {"data.train", "data.eval", "retrieval.corpus"}
FLAGS = {
    "data": data_cli.argument_parser,
    "index": index_cli.argument_parser,
    "serve": server.argument_parser,
    "report": command.argument_parser,
}
COMMANDS = [
    line.strip().partition("  #")[0]
    for line in README.splitlines()
    if re.match(r"    (searchrl|torchrun) ", line)
]


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_composes(command: str, shipped_files: Path) -> None:
    words = shlex.split(command)
    if words[1] in FLAGS:
        FLAGS[words[1]]().parse_args(words[2:])
        return
    if words[1] == "config":
        main(words[1:])
        return
    if words[1] == "play":
        words[2:] = play.argument_parser().parse_intermixed_args(words[2:]).overrides
    overrides = [word for word in words if "=" in word]
    touch_models(overrides, shipped_files)
    if "group_size=1" in overrides:  # shown as an example of a refused value
        with pytest.raises(ConfigError, match="group_size=1"):
            load_config(overrides)
    else:
        load_config(overrides, training=words[1] not in ("eval", "play"))


@pytest.mark.parametrize("target", re.findall(r"`?make ([a-z-]+)", README))
def test_every_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", README))
def test_every_link_leads_somewhere(link: str) -> None:
    assert (ROOT / link).exists()


def test_the_tree_names_every_module() -> None:
    package = ROOT / "src" / "searchrl"
    names = [path.name for path in package.glob("*.py") if path.name != "__init__.py"]
    names += [f"{path.parent.name}/" for path in package.glob("*/__init__.py")]
    assert [
        name for name in names if not re.search(rf"^      {re.escape(name)} ", README, re.MULTILINE)
    ] == []


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([a-z_]+(?:\.[A-Za-z_]+)+)`", README))))
def test_every_named_function_exists(name: str) -> None:
    """``module.attribute`` in the README stands in that module's source."""
    if name.endswith((".yaml", ".json", ".jsonl", ".log", ".html")) or name in SETTINGS:
        return
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            spec = importlib.util.find_spec("searchrl." + ".".join(parts[:cut]))
        except ModuleNotFoundError:
            spec = None
        if spec is not None and spec.origin is not None:
            source = Path(spec.origin).read_text(encoding="utf-8")
            assert all(
                re.search(rf'\b(class|def) {part}\b|^{part}\b|"{part}",', source, re.M)
                for part in parts[cut:]
            )
            return
    pytest.fail(f"the README names {name}, which is no module of searchrl")
