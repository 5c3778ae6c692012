"""Draw global batches of questions, the same for any number of ranks, and resume exactly."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from searchrl.data.errors import DataError
from searchrl.trajectory import Example


class Sampler:
    """An endless stream of examples, cut into global batches of which each rank takes its slice.

    Epoch ``e`` is one permutation of all examples, drawn from ``(seed, e)``; the stream is epoch 0, epoch 1
    and so on without a gap, so a batch may span two epochs and no example is dropped. Worked example with
    5 examples, ``batch_size=4`` and two ranks::

        stream      d a e c b | b e a d c | …
        batch 0     d a e c        rank 0 takes d a, rank 1 takes e c
        batch 1             b   b e a
    """

    def __init__(
        self, examples: Sequence[Example], *, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        """``batch_size`` counts examples (groups) of all ranks together.

        Raises ``DataError`` for no examples, a batch that the ranks cannot share evenly, a rank that does not
        exist, or a negative seed.
        """
        if not examples:
            raise DataError("the sampler got no examples; check the data file and its filters")
        if world_size < 1 or batch_size < 1 or batch_size % world_size != 0:
            raise DataError(
                f"batch_size {batch_size} cannot be shared evenly by {world_size} ranks; make it a multiple"
            )
        if seed < 0:
            raise DataError(f"seed {seed} is negative; choose one from 0 up")
        if not 0 <= rank < world_size:
            raise DataError(f"rank {rank} does not exist in a world of {world_size}")
        self._examples = list(examples)
        self._batch_size = batch_size
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._cursor = 0
        self._fingerprint = fingerprint(self._examples)
        self._epoch = -1
        self._order: list[int] = []

    @property
    def epoch(self) -> float:
        """How many times the stream has gone through the data set, fractions included."""
        return self._cursor / len(self._examples)

    def take(self) -> list[Example]:
        """This rank's ``batch_size / world_size`` examples of the next global batch."""
        share = self._batch_size // self._world_size
        first = self._cursor + self._rank * share
        self._cursor += self._batch_size
        return [self._at(position) for position in range(first, first + share)]

    def state_dict(self) -> dict[str, int | str]:
        """All that ``load_state_dict`` needs; the same on every rank, and valid for another world size."""
        return {"cursor": self._cursor, "seed": self._seed, "fingerprint": self._fingerprint}

    def load_state_dict(self, state: Mapping[str, int | str]) -> None:
        """Continue after the last batch that the saved sampler took.

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
            # numpy keeps the raw stream of a bit generator over its versions, but not ``permutation``: a run
            # resumed after an upgrade must go on with the same order.
            keys = np.random.PCG64([self._seed, epoch]).random_raw(len(self._examples))
            self._order = [int(index) for index in np.argsort(keys, kind="stable")]
            self._epoch = epoch
        return self._examples[self._order[offset]]


def fingerprint(examples: Sequence[Example]) -> str:
    """A hash of ids, questions and answers in order: equal for equal data sets only."""
    digest = hashlib.sha256()
    for example in examples:
        for part in (example.id, example.question, *example.golden_answers, ""):
            digest.update(part.encode("utf-8", "surrogatepass") + b"\x00")
    return digest.hexdigest()
