"""The rules of the module map, held against every file of the package, and the checkers against bad files.

Layers: a module imports only from strictly lower layers, function-level imports included; the modules of one
package may import one another. An entry with a dot gives a module inside a package a layer of its own.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "searchrl"
MAX_FILE, MAX_FUNCTION = 400, 60

LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "answers", "figures"),
    (
        "config",
        "trajectory",
        "distributed",
        "environment",
        "explain",
        "console",
        "trust",
        "data.errors",
        "data.files",
        "data.packages",
    ),
    (
        "protocol",
        "data",
        "rewards",
        "algorithm",
        "attention",
        "batching",
        "metrics",
        "phases",
        "offload",
        "weight_check",
        "collapse",
        "watch",
        "retrieval",
        "models",
        "extensions",
        "overrides",
        "launcher",
        "shards",
        "preemption",
    ),
    ("preflight", "heartbeat", "policy", "zero", "model_shape", "judge", "out_of_memory", "guards", "sinks"),
    (
        "engine",
        "actor",
        "reference",
        "tools",
        "records",
        "scoring",
        "validation",
        "plan",
        "failures",
        "dumps",
    ),
    ("episodes", "weight_sync", "checkpoint", "objective", "samples", "compose"),
    ("evaluation", "warmstart", "sources", "update", "collect", "overlap"),
    ("setup",),
    ("resuming", "evaluation.training"),
    ("trainer", "evaluation.benchmark", "doctor", "replay", "config_cli", "completion", "play", "report"),
    ("cli",),
    ("api",),
)
LAYER_OF = {name: layer for layer, names in enumerate(LAYERS) for name in names}

OWNERS = {
    "vllm": {"engine", "engine.requests"},
    "deepspeed": {"actor"},
    "peft": {"policy"},
    "transformers": {"protocol", "models", "trust", "retrieval.encoder", "policy", "attention"},
}
"""Who may import a library that dictates how its users are written."""

HEAVY = ("torch", "transformers", "peft", "vllm", "deepspeed", "faiss")


class Module(NamedTuple):
    """One file: its name inside the package (``data.packages``), its lines and its syntax tree."""

    name: str
    lines: int
    tree: ast.Module


class Import(NamedTuple):
    """One imported module, absolute, and where."""

    target: str
    line: int
    typing_only: bool


def read(name: str, source: str) -> Module:
    return Module(name, len(source.splitlines()), ast.parse(source))


def modules() -> list[Module]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found.append(read(name, path.read_text(encoding="utf-8")))
    return found


def imports(module: Module) -> Iterator[Import]:
    """Every import anywhere in the file; ``from searchrl.data import packages`` counts as both."""
    guarded = {
        id(child)
        for node in ast.walk(module.tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for child in ast.walk(statement)
    }
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, id(node) in guarded)
        elif isinstance(node, ast.ImportFrom):
            source = "searchrl" if node.level else (node.module or "")
            yield Import(source, node.lineno, id(node) in guarded)
            if source.split(".")[0] == "searchrl":
                for alias in node.names:
                    yield Import(f"{source}.{alias.name}", node.lineno, id(node) in guarded)


def unit(name: str) -> str | None:
    """The longest entry of the layer table that ``name``, without ``searchrl.``, belongs to."""
    parts = name.split(".")
    candidates = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((candidate for candidate in candidates if candidate in LAYER_OF), None)


def layer_faults(module: Module) -> list[str]:
    """Imports from the same or a higher layer, and modules that the table does not know."""
    own = unit(module.name)
    if own is None:
        return [] if module.name in ("", "__main__") else [f"{module.name}: not in the layer table"]
    faults: dict[str, None] = {}  # without repetitions, in order
    for target, line, _ in imports(module):
        package, _, inside = target.partition(".")
        other = unit(inside)
        if package != "searchrl" or other is None or other == own:
            continue
        same_package = other.split(".")[0] == own.split(".")[0]
        if LAYER_OF[other] > LAYER_OF[own] or (LAYER_OF[other] == LAYER_OF[own] and not same_package):
            where = f"{module.name}:{line}: layer {LAYER_OF[own]}"
            faults[f"{where} imports {other}, layer {LAYER_OF[other]}"] = None
    return list(faults)


def owner_faults(module: Module) -> list[str]:
    """Imports of a library outside the modules that own it. For types alone, transformers is free to all."""
    return [
        f"{module.name}:{line}: only {', '.join(sorted(OWNERS[library]))} may import {library}"
        for target, line, typing_only in imports(module)
        if (library := target.split(".")[0]) in OWNERS
        and module.name not in OWNERS[library]
        and not (library == "transformers" and typing_only)
    ]


def size_faults(module: Module) -> list[str]:
    """Files and functions over the budget, docstrings and nested functions counted in."""
    faults = [f"{module.name}: {module.lines} lines, at most {MAX_FILE}"] if module.lines > MAX_FILE else []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION:
                faults.append(
                    f"{module.name}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION}"
                )
    return faults


def doc_faults(module: Module) -> list[str]:
    """Public names without a docstring; names inside functions are nobody's interface."""

    def visit(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[str]:
        if ast.get_docstring(node) is None:
            yield f"{prefix or 'the module'} has no docstring"
        for child in node.body:
            if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
                yield from visit(child, f"{prefix}{'.' if prefix else ''}{child.name}")
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
                inherited = any(
                    ast.unparse(mark).split(".")[-1] in ("override", "setter")
                    for mark in child.decorator_list
                )
                if ast.get_docstring(child) is None and not inherited:
                    yield f"{prefix}{'.' if prefix else ''}{child.name} has no docstring"

    return [f"{module.name}: {fault}" for fault in visit(module.tree, "")]


def cycle_faults(all_modules: list[Module]) -> list[str]:
    """The first import cycle, if any; an import for types alone closes none at run time but counts too."""
    names = {module.name for module in all_modules if module.name}
    graph = {
        module.name: {
            inside
            for target, _, _ in imports(module)
            if (inside := target.removeprefix("searchrl.")) in names and inside != module.name
        }
        for module in all_modules
        if module.name
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" -> ".join(reversed(error.args[1]))]
    return []


# --- the package ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", [layer_faults, owner_faults, size_faults, doc_faults])
def test_every_module_keeps_the_rule(check: object) -> None:
    assert callable(check)
    assert [fault for module in modules() for fault in check(module)] == []


def test_no_module_imports_in_a_circle() -> None:
    assert cycle_faults(modules()) == []


def test_the_checks_see_the_package() -> None:
    names = {module.name for module in modules()}
    assert {"trajectory", "data.packages", "models", "engine"} <= names


@pytest.mark.parametrize("code", ["import searchrl.cli", "from searchrl.cli import main; main()"])
def test_the_command_line_starts_without_the_heavy_libraries(code: str) -> None:
    """``--help`` answers at once: nobody waits ten seconds for torch and vLLM to read an option's name."""
    program = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print('loaded:', *(name for name in {HEAVY} if name in sys.modules)))\n"
        "sys.argv = ['searchrl', '--help']\n" + code
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].strip() == "loaded:"


# --- the checkers: each must see what it is there for ---------------------------------------------------


@pytest.mark.parametrize(
    ("name", "source", "faults"),
    [
        ("models", "from searchrl.trajectory import Turn", 0),
        ("models", "from searchrl.engine import Engine", 1),
        ("models", "def f():\n    import searchrl.trainer", 1),
        ("models", "from searchrl import trainer", 1),
        ("models", "from searchrl.rewards import score", 1),
        ("models", "from searchrl.data.packages import fetch_wheel", 0),
        ("models", "from searchrl.data.facts import Fact", 1),
        ("data.facts", "from searchrl.data.text import clean", 0),
        ("data.facts", "from searchrl.data.packages import fetch_wheel", 0),
        ("data.packages", "from searchrl.data.facts import Fact", 1),
        ("data.packages", "from searchrl.data.errors import DataError", 0),
        ("engine", "if TYPE_CHECKING:\n    from searchrl.actor import Actor", 1),
        ("report.page", "from searchrl.trainer import train", 1),
        ("cli", "from searchrl.report.command import main", 0),
        ("novelty", "x = 1", 1),
    ],
)
def test_layer_faults(name: str, source: str, faults: int) -> None:
    assert len(layer_faults(read(name, source))) == faults


@pytest.mark.parametrize(
    ("name", "source", "faults"),
    [
        ("engine", "import vllm", 0),
        ("episodes", "from vllm import LLM", 1),
        ("episodes", "if TYPE_CHECKING:\n    from vllm import LLM", 1),
        ("actor", "def f():\n    import deepspeed.ops", 0),
        ("distributed", "def f():\n    import deepspeed.ops", 1),
        ("retrieval.encoder", "from transformers import AutoModel", 0),
        ("retrieval.index", "from transformers import AutoModel", 1),
        ("episodes", "if TYPE_CHECKING:\n    from transformers import PreTrainedTokenizerBase", 0),
    ],
)
def test_owner_faults(name: str, source: str, faults: int) -> None:
    assert len(owner_faults(read(name, source))) == faults


@pytest.mark.parametrize(
    ("source", "faults"),
    [
        ("x = 1\n" * 400, 0),
        ("x = 1\n" * 401, 1),
        ("def f():\n" + "    x = 1\n" * 59, 0),
        ("def f():\n" + "    x = 1\n" * 60, 1),
        ("class C:\n    async def f(self):\n" + "        x = 1\n" * 60, 1),
    ],
)
def test_size_faults(source: str, faults: int) -> None:
    assert len(size_faults(read("any", source))) == faults


@pytest.mark.parametrize(
    ("source", "faults"),
    [
        ('"""Doc."""\ndef f():\n    """Doc."""\n    def inner(): ...\n', 0),
        ('"""Doc."""\ndef _f(): ...\nclass _C:\n    def f(self): ...\n', 0),
        ("x = 1", 1),
        ('"""Doc."""\ndef f(): ...', 1),
        ('"""Doc."""\nclass C: ...', 1),
        ('"""Doc."""\nclass C:\n    """Doc."""\n    async def f(self): ...\n', 1),
        ('"""Doc."""\nclass C:\n    """Doc."""\n    @override\n    def f(self): ...\n', 0),
    ],
)
def test_doc_faults(source: str, faults: int) -> None:
    assert len(doc_faults(read("any", source))) == faults


def test_cycle_faults() -> None:
    straight = [read("data.a", "from searchrl.data.b import f"), read("data.b", "import os")]
    assert cycle_faults(straight) == []
    circle = [
        read("data.a", "from searchrl.data.b import f"),
        read("data.b", "def g():\n    from searchrl.data import a"),
    ]
    assert len(cycle_faults(circle)) == 1
    assert "data.a -> data.b" in cycle_faults(circle)[0] or "data.b -> data.a" in cycle_faults(circle)[0]
