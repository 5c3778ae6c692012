"""Python values as settings: each arrives as it was given, through Hydra's own parser."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchrl.compose import compose_config
from searchrl.config import Config, ConfigError, Schedule
from searchrl.extensions import load_function
from searchrl.overrides import command_line_overrides, function_overrides
from searchrl.trajectory import Example, Trajectory


def composed(overrides: dict[str, object]) -> Config:
    return compose_config(["+experiment=smoke", *command_line_overrides(overrides)])[0]


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("steps", 7, 7),
        ("optimizer.lr", 1e-5, 1e-5),
        ("optimizer.lr", np.float64(0.25), 0.25),
        ("batching.packing", False, False),
        ("resume", True, True),
        ("name", 'it\'s a, {b}: [c] = "d" \\', 'it\'s a, {b}: [c] = "d" \\'),
        ("name", "12", "12"),
        ("name", "", ""),
        ("name", " null ", " null "),
        ("name", "a\nb ünï 北", "a\nb ünï 北"),
        ("checkpoint", Path("a b/c"), "a b/c"),
        ("run_dir", "${assets}/there", "assets/there"),
        ("data.train_hops", (1, 2), [1, 2]),
        ("data.train_hops", [], []),
        ("retrieval.urls", ["http://a:1/x,y", "http://b"], ["http://a:1/x,y", "http://b"]),
        ("optimizer.schedule", Schedule.linear, Schedule.linear),
        ("retrieval", "none", None),
    ],
)
def test_a_value_arrives_as_it_was_given(key: str, value: object, found: object) -> None:
    cfg: Any = composed({key: value})
    if key == "retrieval":  # a group of settings
        assert cfg.retrieval.kind == "none"
        return
    for part in key.split("."):
        cfg = getattr(cfg, part)
    assert cfg == found
    assert type(cfg) is type(found)


def test_a_mapping_sets_several_at_once() -> None:
    cfg = composed(
        {"update": {"epochs": 2, "minibatches": 3}, "+reward.kwargs": {"names": ["x y", None], "n": 1}}
    )
    assert (cfg.update.epochs, cfg.update.minibatches) == (2, 3)
    assert cfg.reward.kwargs == {"names": ["x y", None], "n": 1}


@settings(max_examples=6, deadline=None)  # composing takes a third of a second: many texts each time
@given(st.lists(st.text(st.characters(exclude_characters="$", exclude_categories=["Cs"])), min_size=30))
def test_any_text_arrives(texts: list[str]) -> None:
    assert list(composed({"retrieval.urls": texts}).retrieval.urls) == texts


def test_words_of_the_command_line_stay_as_they_are() -> None:
    assert command_line_overrides(["steps=5", "retrieval=none"]) == ["steps=5", "retrieval=none"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("steps=5", "overrides='steps=5' is one text; give a list, ['steps=5'], or a mapping"),
        ({"steps": {1, 2}}, "overrides['steps']={1, 2} is a set; a setting is a number"),
        ({"data.train_hops": [1, object]}, "overrides['data.train_hops']=<class 'object'> is a type"),
    ],
)
def test_what_no_setting_can_hold_is_refused(overrides: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        command_line_overrides(overrides)


# --- functions ------------------------------------------------------------------------------------------


def mine(trajectory: Trajectory, example: Example) -> float:
    """A reward."""
    del trajectory, example
    return 1.0


class Holder:
    """Has a method."""

    def method(self) -> float:
        """No function of a module."""
        return 1.0


@pytest.mark.parametrize(
    ("section", "choice"),
    [("reward", "reward.kind"), ("advantage", "advantage.kind"), ("importance", "importance.mode")],
)
def test_a_function_is_found_again_by_its_name(section: str, choice: str) -> None:
    kind, path = function_overrides({section: mine, "loss": None})
    assert kind == f"{choice}=custom"
    cfg: Any = composed({}) if not path else compose_config(["+experiment=smoke", kind, path])[0]
    found = load_function(getattr(cfg, section).import_path, {}, section=section, positional=2)
    assert isinstance(found, partial)
    assert found.func is mine


def inner() -> Callable[..., float]:
    def local(trajectory: Trajectory, example: Example) -> float:
        del trajectory, example
        return 0.0

    return local


@pytest.mark.parametrize(
    "function", [lambda t, e: 0.0, inner(), Holder().method, Holder.method, partial(mine), Holder]
)
def test_what_has_no_name_of_its_own_is_refused(function: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"reward=.* cannot be found by its name, as a run has to"):
        function_overrides({"reward": function})
