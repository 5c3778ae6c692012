"""A small slice of the fuzzing campaign, the same in every run.

The long form is ``benchmarks/faults/fuzzing.py``. Cases are drawn by functions of a ``Random``; for outputs
hypothesis plays the random numbers as well, so that a case that fails is shrunk before it is shown.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from fuzz import configs, outputs, rows


@pytest.mark.integration
def test_any_output_becomes_an_episode_that_keeps_the_promises(tokenizer: PreTrainedTokenizerFast) -> None:
    vocabulary = outputs.Vocabulary(tokenizer)
    seen: Counter[str] = Counter()

    with asyncio.Runner() as runner:

        @settings(deadline=None, database=None, derandomize=True, max_examples=50)
        @given(st.randoms(use_true_random=False))
        def play(random: Random) -> None:
            seen.update(outputs.check_case(vocabulary, runner, outputs.make_case(random, vocabulary)))

        play()
        for number in range(120):
            case = outputs.make_case(Random(number), vocabulary)
            seen.update(outputs.check_case(vocabulary, runner, case))
    assert seen["outputs"] > 400
    kinds = (
        "searches",
        "outcome answered",
        "outcome context_limit",
        "turn ended by stop",
        "turn ended by eos",
    )
    assert [kind for kind in kinds if seen[kind] < 10] == [], "the cases are too narrow"


@pytest.mark.parametrize("name", rows.CHECKS)
def test_malformed_data_is_refused_or_right(name: str, tmp_path: Path) -> None:
    seen = Counter(rows.CHECKS[name](Random(number), tmp_path) for number in range(300))
    assert seen["refused"] > 20
    assert seen["read"] > 20


def test_malformed_configurations_are_refused_or_right(shipped_files: Path) -> None:
    seen = Counter(configs.check_config(configs.make_malformed(Random(number))) for number in range(30))
    assert seen["refused"] > 20


def test_the_schema_has_fields_of_every_kind() -> None:
    assert {leaf.kind for leaf in configs.LEAVES} == set(configs.NEVER)
    assert len(configs.LEAVES) > 130


def test_a_number_that_cannot_be_meant_would_be_seen() -> None:
    for key, value in (("optimizer.lr", math.nan), ("steps", -1), ("seed", 2**32), ("run_dir", " ")):
        with pytest.raises(AssertionError, match=key):
            configs.check_value(key, value)
