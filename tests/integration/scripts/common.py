"""What the check scripts share."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from searchrl.trajectory import Finish, Outcome, Sample, Trajectory, Turn

VOCABULARY = 250
"""Token ids below this exist in every tiny model and are ordinary text."""


def random_ids(rng: random.Random, count: int) -> list[int]:
    """So many ordinary token ids."""
    return [rng.randrange(VOCABULARY) for _ in range(count)]


def random_samples(seed: int, count: int) -> list[Sample]:
    """Trajectories of one to three turns and unequal lengths; log-probabilities around a random model's."""
    rng = random.Random(seed)
    samples = []
    for index in range(count):
        turns = []
        for _ in range(rng.randint(1, 3)):
            turns.append(_random_turn(rng, sampled=rng.randint(1, 12), appended=rng.randint(0, 20)))
        trajectory = Trajectory(
            prompt_ids=random_ids(rng, rng.randint(2, 30)), turns=turns, outcome=Outcome.ANSWERED, answer=None
        )
        samples.append(Sample(trajectory=trajectory, advantage=rng.gauss(0.0, 1.0), id=f"{index}/0"))
    return samples


def grouped_samples(seed: int, groups: int, members: int) -> list[Sample]:
    """Short trajectories; those of a group share their prompt and, half of them, the whole first turn."""
    rng = random.Random(seed)
    samples = []
    for group in range(groups):
        prompt = random_ids(rng, rng.randint(2, 8))
        shared = _random_turn(rng, sampled=rng.randint(1, 6), appended=rng.randint(1, 6))
        for member in range(members):
            turns = [
                _random_turn(rng, sampled=rng.randint(1, 6), appended=rng.randint(1, 6))
                for _ in range(rng.randint(1, 3))
            ]
            if member % 2:
                turns[0] = replace(shared)
            trajectory = Trajectory(prompt_ids=prompt, turns=turns, outcome=Outcome.ANSWERED, answer=None)
            samples.append(
                Sample(trajectory=trajectory, advantage=rng.gauss(0.0, 1.0), id=f"{group}/{member}")
            )
    return samples


def _random_turn(rng: random.Random, *, sampled: int, appended: int) -> Turn:
    return Turn(
        token_ids=random_ids(rng, sampled),
        logprobs=[rng.gauss(-5.7, 0.7) for _ in range(sampled)],
        text="",
        finish=Finish.STOP,
        policy_version=0,
        observation_ids=random_ids(rng, appended),
    )


def probe_prompts(lengths: Sequence[int]) -> list[list[int]]:
    """Fixed prompts of these lengths."""
    rng = random.Random(7)
    return [random_ids(rng, length) for length in lengths]


def write_results(out: Path, results: Mapping[str, object]) -> None:
    """Hand the results to the test."""
    (out / "results.json").write_text(json.dumps(results), encoding="utf-8")
