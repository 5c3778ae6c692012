"""Samples to micro-batches: packed or padded, balanced over ranks. Pure; reductions are the caller's.

A packed row holds whole trajectories one after another, and ``position_ids`` restart at each. A
:class:`PrefixTree` says along which paths attention goes in it; FlashAttention, which runs the row itself,
finds the restarts. Padded rows need neither: padding is on the right, where causal attention cannot see it,
and positions run on through it.

Example, two trajectories packed into one row::

    input_ids       a a a a a b b b
    position_ids    0 1 2 3 4 0 1 2
    segment_ids     0 0 0 0 0 1 1 1
    loss_mask       0 0 1 1 1 0 1 1
    sample_ids      [["0/0", "0/1"]]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from searchrl.config import Attention, Config
from searchrl.trajectory import Sample

PADDING_SEGMENT = -1
"""``segment_ids`` at positions that hold no trajectory's token."""


@dataclass(kw_only=True, slots=True)
class PrefixTree:
    """The n distinct prefixes of a packed row's T tokens, each computed once.

    The trajectories of a group share their prompt, often their first query and then its whole observation. A
    causal model's hidden state depends on a token's prefix alone, so equal prefixes need one computation, and
    the gradient of every trajectory flows through it. Attention goes along each trajectory's path::

        row       a b c d | a b e | a b c f        T = 11
        nodes     a b c d e f                      n = 6
        node_of   0 1 2 3   0 1 4   0 1 2 5
        paths     0 1 2 3 | 0 1 4 . | 0 1 2 5      S = 3, L = 4
        place     0 1 2 3 6 11                     in the flattened paths
    """

    input_ids: Tensor
    """long [1, n]."""
    position_ids: Tensor
    """long [1, n], a node's depth."""
    paths: Tensor
    """long [S, L], each trajectory's nodes, padded on the right with any node."""
    place: Tensor
    """long [n], where each node first stands in the flattened ``paths``."""
    node_of: Tensor
    """long [T], the node of each token of the row."""

    def to(self, device: torch.device | str) -> PrefixTree:
        """The same tree with its tensors on ``device``."""
        return PrefixTree(
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            paths=self.paths.to(device),
            place=self.place.to(device),
            node_of=self.node_of.to(device),
        )


@dataclass(kw_only=True, slots=True)
class MicroBatch:
    """What one forward and backward pass reads: B rows of T tokens, each row holding one or more segments."""

    input_ids: Tensor
    """long [B, T]; 0 at padding."""
    position_ids: Tensor
    """long [B, T], restarting at 0 with each segment; running on through padding."""
    segment_ids: Tensor
    """long [B, T], 0, 1, … within each row; -1 at padding."""
    loss_mask: Tensor
    """bool [B, T], True at sampled tokens."""
    sampling_logprobs: Tensor
    """float32 [B, T], the engine's at loss tokens, 0 elsewhere."""
    advantages: Tensor
    """float32 [B, T], the trajectory's advantage at loss tokens, 0 elsewhere."""
    sample_ids: list[list[str]]
    """Per row and segment, the id of the sample."""
    tree: PrefixTree | None = None
    """For a packed row of several trajectories: what the model runs on in place of the row."""

    @property
    def trajectory_ids(self) -> list[str]:
        """All sample ids, row by row: what ``trajectory_index`` points into."""
        return [sample_id for row in self.sample_ids for sample_id in row]

    @property
    def trajectory_index(self) -> Tensor:
        """Each token's entry, long [B, T], in ``trajectory_ids``; meaningless at padding."""
        counts = [len(row) for row in self.sample_ids]
        first = [sum(counts[:row]) for row in range(len(counts))]
        return self.segment_ids + torch.tensor(first, device=self.segment_ids.device).unsqueeze(1)

    def split(self, values: Tensor) -> dict[str, Tensor]:
        """Values of the N loss tokens, [N], by sample id; ``join`` is the inverse."""
        index = self.trajectory_index[self.loss_mask]
        counts = torch.bincount(index, minlength=len(self.trajectory_ids)).tolist()
        return dict(zip(self.trajectory_ids, values.split(counts), strict=True))

    def join(self, values: Mapping[str, Tensor]) -> Tensor:
        """[N] values of the loss tokens, which stand sample by sample, from those of each sample."""
        parts = [values[sample_id] for sample_id in self.trajectory_ids]
        return torch.cat(parts) if parts else self.sampling_logprobs.new_zeros(0)

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same micro-batch with its tensors on ``device``."""
        return MicroBatch(
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            segment_ids=self.segment_ids.to(device),
            loss_mask=self.loss_mask.to(device),
            sampling_logprobs=self.sampling_logprobs.to(device),
            advantages=self.advantages.to(device),
            sample_ids=self.sample_ids,
            tree=None if self.tree is None else self.tree.to(device),
        )


def make_batches(samples: Sequence[Sample], cfg: Config, max_tokens: int) -> list[MicroBatch]:
    """Micro-batches within the token budget, packed or padded as the run does."""
    if not cfg.batching.packing:
        return pad(samples, max_tokens)
    # FlashAttention runs the row itself, and so every trajectory whole.
    return pack(samples, max_tokens, share_prefixes=cfg.model.attention is Attention.sdpa)


def pack(samples: Sequence[Sample], max_tokens: int, *, share_prefixes: bool = True) -> list[MicroBatch]:
    """Pack whole trajectories into rows of at most ``max_tokens``: first fit decreasing, a row a micro-batch.

    Trajectories with the same prompt travel together and share their prefixes (see :class:`PrefixTree`); what
    counts against ``max_tokens`` is what the model computes. A trajectory longer than ``max_tokens`` gets a
    row of its own. The fullest rows come first, so that running out of memory shows at once; within a row,
    samples keep their order. Without ``share_prefixes`` every trajectory is computed, and counts, whole.

    Raises:
        ValueError: ``max_tokens`` is not positive, or a sample is empty or has other than one log-probability
            a token.
    """
    lengths = _checked_lengths(samples, max_tokens)
    units, sizes = [[index] for index in range(len(samples))], lengths
    if share_prefixes:
        units, sizes = _units(samples, max_tokens)
    rows: list[list[int]] = []
    room: list[int] = []
    for number in _longest_first(sizes):
        row = next((row for row, free in enumerate(room) if sizes[number] <= free), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(max_tokens)
        rows[row] += units[number]
        room[row] -= sizes[number]
    contents = [[samples[index] for index in sorted(row)] for row in rows]
    return [_build_packed(row, share_prefixes) for row in contents]


def pad(samples: Sequence[Sample], max_tokens: int) -> list[MicroBatch]:
    """One trajectory a row, rows of similar length together, padded on the right; longest first.

    B × T ≤ ``max_tokens`` for each micro-batch, unless a single trajectory is longer.

    Raises:
        ValueError: as for :func:`pack`.
    """
    lengths = _checked_lengths(samples, max_tokens)
    batches: list[list[int]] = []
    for index in _longest_first(lengths):
        # The first row of a batch is its longest, so its length is the width of all.
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return [_build([[samples[index]] for index in sorted(batch)]) for batch in batches]


def split_minibatches(samples: Sequence[Sample], count: int) -> list[list[Sample]]:
    """At most ``count`` parts for as many optimizer steps: whole groups, in order, as evenly as they divide.

    Groups are told by the part of a sample's id before the slash. Fewer groups give fewer parts.

    Raises:
        ValueError: ``count`` is not positive.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.id.partition("/")[0], []).append(sample)
    members = list(groups.values())
    count = min(count, len(members))
    edges = [len(members) * part // count for part in range(count + 1)] if count else [0]
    return [[sample for group in members[start:end] for sample in group] for start, end in pairwise(edges)]


def balance(samples: Sequence[Sample], world_size: int) -> list[list[Sample]]:
    """Distribute samples over ranks so that their token counts are close.

    The longest sample goes first, each to the least loaded rank. Deterministic: ties go to the earlier
    sample and the lower rank; each rank's samples keep their order. A rank may get none; it then runs
    :func:`empty_microbatch`.

    Raises:
        ValueError: ``world_size`` is not positive.
    """
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, got {world_size}")
    lengths = [len(sample.trajectory.token_ids) for sample in samples]
    assigned: list[list[int]] = [[] for _ in range(world_size)]
    load = [0] * world_size
    for index in _longest_first(lengths):
        rank = load.index(min(load))
        assigned[rank].append(index)
        load[rank] += lengths[index]
    return [[samples[index] for index in sorted(indices)] for indices in assigned]


def empty_microbatch() -> MicroBatch:
    """One row of two padding tokens without loss, for a rank that has no work while others do.

    The loss is a sum over no tokens: 0, with a zero gradient for every parameter. So collectives match and
    nothing changes.
    """
    return MicroBatch(
        input_ids=torch.zeros(1, 2, dtype=torch.long),
        position_ids=torch.arange(2).unsqueeze(0),
        segment_ids=torch.full((1, 2), PADDING_SEGMENT),
        loss_mask=torch.zeros(1, 2, dtype=torch.bool),
        sampling_logprobs=torch.zeros(1, 2),
        advantages=torch.zeros(1, 2),
        sample_ids=[[]],
    )


def count_loss_tokens(samples: Iterable[Sample]) -> int:
    """Loss tokens of these samples; summed over ranks, the denominator of the token-level loss."""
    return sum(sample.trajectory.num_sampled for sample in samples)


def _longest_first(lengths: Sequence[int]) -> list[int]:
    """Indices by falling length; equal lengths keep their order."""
    return sorted(range(len(lengths)), key=lambda index: -lengths[index])


def _checked_lengths(samples: Sequence[Sample], max_tokens: int) -> list[int]:
    """Tokens of each sample, once each sample is known to be whole."""
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    for sample in samples:
        if not sample.trajectory.prompt_ids:
            raise ValueError(f"sample {sample.id} has an empty prompt, so nothing predicts its first token")
        for number, turn in enumerate(sample.trajectory.turns):
            if len(turn.logprobs) != len(turn.token_ids):
                raise ValueError(
                    f"sample {sample.id}, turn {number}: {len(turn.logprobs)} log-probabilities for "
                    f"{len(turn.token_ids)} sampled tokens"
                )
    return [len(sample.trajectory.token_ids) for sample in samples]


Trie = dict[tuple[int, int], int]
"""(parent, token) to node; nodes count up from 0, and a first token's parent is -1."""


def _units(samples: Sequence[Sample], max_tokens: int) -> tuple[list[list[int]], list[int]]:
    """Samples that share a prompt, together as far as their distinct prefixes fit a row.

    Returns indices of samples by unit, and how many distinct prefixes each unit has.
    """
    units: list[list[int]] = []
    tries: list[Trie] = []
    newest: dict[tuple[int, ...], int] = {}
    for index, sample in enumerate(samples):
        prompt, token_ids = tuple(sample.trajectory.prompt_ids), sample.trajectory.token_ids
        number = newest.get(prompt)
        if number is None or _size_with(tries[number], token_ids) > max_tokens:
            number = newest[prompt] = len(units)
            units.append([])
            tries.append({})
        units[number].append(index)
        _insert(tries[number], token_ids)
    return units, [len(trie) for trie in tries]


def _insert(trie: Trie, token_ids: Sequence[int]) -> list[int]:
    """Add a sequence; returns the node of each token."""
    path: list[int] = []
    parent = -1
    for token in token_ids:
        parent = trie.setdefault((parent, token), len(trie))
        path.append(parent)
    return path


def _size_with(trie: Trie, token_ids: Sequence[int]) -> int:
    """Nodes that the trie would have with this sequence: after the first new token all are new."""
    parent = -1
    for known, token in enumerate(token_ids):
        node = trie.get((parent, token))
        if node is None:
            return len(trie) + len(token_ids) - known
        parent = node
    return len(trie)


def _build_packed(row: Sequence[Sample], share_prefixes: bool) -> MicroBatch:
    """One row; with a tree if there are several trajectories, which must not see one another."""
    batch = _build([row])
    if len(row) > 1:
        batch.tree = tree_of([sample.trajectory.token_ids for sample in row], share_prefixes)
    return batch


def tree_of(sequences: Sequence[Sequence[int]], share_prefixes: bool) -> PrefixTree:
    """The tree of token ids; without ``share_prefixes`` every token is a node of its own."""
    paths: list[list[int]] = []
    tokens: list[int] = []
    if share_prefixes:
        trie: Trie = {}
        paths = [_insert(trie, sequence) for sequence in sequences]
        tokens = [token for _, token in trie]
    else:
        for sequence in sequences:
            paths.append(list(range(len(tokens), len(tokens) + len(sequence))))
            tokens += sequence
    width = max(map(len, paths))
    padded = torch.zeros(len(paths), width, dtype=torch.long)
    place = torch.empty(len(tokens), dtype=torch.long)
    for number in reversed(range(len(paths))):  # so that the first to hold a node has the last word
        nodes = torch.tensor(paths[number])
        padded[number, : len(nodes)] = nodes
        place[nodes] = torch.arange(len(nodes)) + number * width
    return PrefixTree(
        input_ids=torch.tensor([tokens]),
        position_ids=(place % width).unsqueeze(0),
        paths=padded,
        place=place,
        node_of=torch.tensor([node for path in paths for node in path]),
    )


def _build(rows: Sequence[Sequence[Sample]]) -> MicroBatch:
    """Lay the samples of each row one after another and pad the rows on the right to the longest."""
    width = max(sum(len(sample.trajectory.token_ids) for sample in row) for row in rows)
    shape = (len(rows), width)
    batch = MicroBatch(
        input_ids=torch.zeros(shape, dtype=torch.long),
        position_ids=torch.zeros(shape, dtype=torch.long),
        segment_ids=torch.full(shape, PADDING_SEGMENT),
        loss_mask=torch.zeros(shape, dtype=torch.bool),
        sampling_logprobs=torch.zeros(shape),
        advantages=torch.zeros(shape),
        sample_ids=[[sample.id for sample in row] for row in rows],
    )
    for number, row in enumerate(rows):
        start = 0
        for segment, sample in enumerate(row):
            mask = torch.tensor(sample.trajectory.loss_mask)
            part = (number, slice(start, start + len(mask)))
            batch.input_ids[part] = torch.tensor(sample.trajectory.token_ids)
            # To the end of the row: the next segment overwrites it, and padding after the last one runs on.
            batch.position_ids[number, start:] = torch.arange(width - start)
            batch.segment_ids[part] = segment
            batch.loss_mask[part] = mask
            batch.sampling_logprobs[part] = torch.tensor(sample.trajectory.logprobs)
            batch.advantages[part] = sample.advantage * mask
            start += len(mask)
    return batch
