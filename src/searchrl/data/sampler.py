"""Draw questions for all engines together, the same for any number of them, and resume exactly."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from searchrl.data.errors import DataError
from searchrl.trajectory import Example


class Sampler:
    """An endless stream of examples; each draw is shared by the engines, of which each takes its slice.

    Epoch ``e`` is one permutation of all examples, drawn from ``(seed, e)``; the stream is epoch 0, epoch 1
    and so on without a gap, so a draw may span two epochs and no example is dropped. Worked example with
    5 examples, two engines, and draws of 4 and 2::

        position    0 1 2 3 4   5 6 7 8 9
        stream      d a e c b | b e a d c | …
        take(4)     d a e c        engine 0 takes d a, engine 1 takes e c
        take(2)             b   b  engine 0 takes b, engine 1 takes b
    """

    def __init__(self, examples: Sequence[Example], *, seed: int, engine: int = 0, engines: int = 1) -> None:
        """Start at the beginning of the stream.

        Raises ``DataError`` for no examples, an engine that does not exist, or a negative seed.
        """
        if not examples:
            raise DataError("the sampler got no examples; check the data file and its filters")
        if seed < 0:
            raise DataError(f"seed {seed} is negative; choose one from 0 up")
        if not 0 <= engine < engines:
            raise DataError(f"engine {engine} does not exist among {engines}")
        self._examples = list(examples)
        self._seed = seed
        self._engine = engine
        self.engines = engines
        """How many share each draw."""
        self._cursor = 0
        self._fingerprint = fingerprint(self._examples)
        self._epoch = -1
        self._order: list[int] = []

    @property
    def epoch(self) -> float:
        """How many times the stream has gone through the data set, fractions included."""
        return self._cursor / len(self._examples)

    def take(self, count: int) -> list[tuple[int, Example]]:
        """This engine's share of the next ``count`` examples of the stream, each with its position there.

        A position is drawn once in a run, however often it is resumed: it serves as the group's id.

        Raises ``DataError`` if the engines cannot share ``count`` evenly.
        """
        if count < 1 or count % self.engines:
            raise DataError(
                f"{count} examples cannot be shared evenly by {self.engines} engines; make it a multiple"
            )
        share = count // self.engines
        first = self._cursor + self._engine * share
        self._cursor += count
        return [(position, self._at(position)) for position in range(first, first + share)]

    def state_dict(self) -> dict[str, int | str]:
        """All that ``load_state_dict`` needs; the same on every rank, and valid for any number of engines."""
        return {"cursor": self._cursor, "seed": self._seed, "fingerprint": self._fingerprint}

    def load_state_dict(self, state: Mapping[str, int | str]) -> None:
        """Continue after the last draw of the saved sampler.

        Raises ``DataError`` if the state was saved with another data set or seed, or is not such a state.
        """
        missing = {"cursor", "seed", "fingerprint"} - state.keys()
        if missing:
            raise DataError(
                f"the saved sampler state lacks {sorted(missing)}; resume from an intact checkpoint"
            )
        if state["fingerprint"] != self._fingerprint:
            raise DataError(
                "the checkpoint was made with another training set (other rows or another order): point the "
                "data configuration to the original file, or start a new run from the checkpoint's weights"
            )
        if state["seed"] != self._seed:
            raise DataError(
                f"the checkpoint was made with seed {state['seed']}, not {self._seed}: set it back"
            )
        cursor = state["cursor"]
        if not isinstance(cursor, int) or cursor < 0:
            raise DataError(
                f"the saved sampler cursor {cursor!r} is no position; resume from an intact checkpoint"
            )
        self._cursor = cursor

    def _at(self, position: int) -> Example:
        epoch, offset = divmod(position, len(self._examples))
        if epoch != self._epoch:
            self._order = shuffled(len(self._examples), self._seed, epoch)
            self._epoch = epoch
        return self._examples[self._order[offset]]


def shuffled(count: int, *seed: int) -> list[int]:
    """The numbers below ``count`` in an order that ``seed`` (from 0 up) decides, whatever numpy's version.

    numpy keeps the raw stream of a bit generator over its versions, but not ``permutation``: a run resumed
    after an upgrade must go on with the same order.
    """
    keys = np.random.PCG64(seed).random_raw(count)
    return [int(index) for index in np.argsort(keys, kind="stable")]


def fingerprint(examples: Sequence[Example]) -> str:
    """A hash of ids, questions, answers and ready prompts in order: equal for equal data sets only."""
    digest = hashlib.sha256()
    for example in examples:
        prompt = [part for message in example.prompt or () for part in (message.role, message.content)]
        for part in (example.id, example.question, *example.golden_answers, "", *prompt):
            digest.update(part.encode("utf-8", "surrogatepass") + b"\x00")
    return digest.hexdigest()
