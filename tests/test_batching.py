"""Packing and padding: every token once, provenance kept, and the same log-probabilities as one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from searchrl.algorithm.logprobs import chunked_logprobs, head_positions
from searchrl.batching import (
    MicroBatch,
    balance,
    count_loss_tokens,
    empty_microbatch,
    pack,
    pad,
    split_minibatches,
)
from searchrl.trajectory import Finish, Outcome, Sample, Trajectory, Turn

VOCAB = 64


def make_sample(number: int, prompt: int, turns: list[tuple[int, int]]) -> Sample:
    """A sample of ``prompt`` tokens and turns of (sampled, observed) tokens; contents tell samples apart."""
    counter = iter(range(10_000))

    def ids(count: int) -> list[int]:
        return [(7 * number + 3 * next(counter)) % VOCAB for _ in range(count)]

    prompt_ids = ids(prompt)
    made = [
        Turn(
            token_ids=ids(sampled),
            logprobs=[-0.125 * (number + place + 1) for place in range(sampled)],
            text="",
            finish=Finish.STOP,
            policy_version=0,
            observation_ids=ids(observed),
        )
        for sampled, observed in turns
    ]
    trajectory = Trajectory(prompt_ids=prompt_ids, turns=made, outcome=Outcome.ANSWERED, answer="x")
    return Sample(trajectory=trajectory, advantage=float(number + 1), id=f"{number}/0")


samples_strategy = st.lists(
    st.tuples(st.integers(1, 12), st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), max_size=3)),
    min_size=1,
    max_size=12,
).map(lambda shapes: [make_sample(number, *shape) for number, shape in enumerate(shapes)])


def check_contents(batches: list[MicroBatch], samples: list[Sample]) -> None:
    """Every sample stands in exactly one segment, whole and in order, and nothing else stands anywhere."""
    by_id = {sample.id: sample for sample in samples}
    seen: list[str] = []
    for batch in batches:
        trajectory_index = batch.trajectory_index
        for row, row_ids in enumerate(batch.sample_ids):
            covered = 0
            for segment, sample_id in enumerate(row_ids):
                trajectory = by_id[sample_id].trajectory
                where = batch.segment_ids[row] == segment
                assert where.nonzero().squeeze(1).tolist() == list(
                    range(covered, covered + len(trajectory.token_ids))
                )
                covered += len(trajectory.token_ids)
                advantages = [by_id[sample_id].advantage * mask for mask in trajectory.loss_mask]
                assert batch.input_ids[row][where].tolist() == trajectory.token_ids
                assert batch.loss_mask[row][where].tolist() == trajectory.loss_mask
                assert batch.sampling_logprobs[row][where].tolist() == trajectory.logprobs
                assert batch.advantages[row][where].tolist() == advantages
                assert batch.position_ids[row][where].tolist() == list(range(len(trajectory.token_ids)))
                names = {batch.trajectory_ids[index] for index in trajectory_index[row][where].tolist()}
                assert names == {sample_id}
                seen.append(sample_id)
            padding = batch.segment_ids[row] == -1
            assert int(padding.sum()) == batch.input_ids.shape[1] - covered
            assert not batch.loss_mask[row][padding].any()
            assert not batch.advantages[row][padding].any()
            # transformers reads any other step than +1 as the start of another packed sequence.
            steps = batch.position_ids[row].diff()[covered - 1 :]
            assert (steps == 1).all()
    assert sorted(seen) == sorted(by_id)
    assert sum(int(batch.loss_mask.sum()) for batch in batches) == count_loss_tokens(samples)


@settings(deadline=None, max_examples=60)
@given(samples_strategy, st.integers(1, 60))
def test_pack(samples: list[Sample], max_tokens: int) -> None:
    batches = pack(samples, max_tokens)
    check_contents(batches, samples)
    for batch in batches:
        assert batch.input_ids.shape[0] == 1
        assert batch.input_ids.shape[1] <= max_tokens or len(batch.sample_ids[0]) == 1
        assert (batch.segment_ids >= 0).all()
        numbers = [int(sample_id.split("/")[0]) for sample_id in batch.sample_ids[0]]
        assert numbers == sorted(numbers)


@settings(deadline=None, max_examples=60)
@given(samples_strategy, st.integers(1, 60))
def test_pad(samples: list[Sample], max_tokens: int) -> None:
    batches = pad(samples, max_tokens)
    check_contents(batches, samples)
    assert [batch.input_ids.shape[1] for batch in batches] == sorted(
        (batch.input_ids.shape[1] for batch in batches), reverse=True
    )
    for batch in batches:
        assert all(len(row) == 1 for row in batch.sample_ids)
        assert batch.input_ids.numel() <= max_tokens or batch.input_ids.shape[0] == 1


def test_pack_is_first_fit_decreasing() -> None:
    samples = [make_sample(number, length, []) for number, length in enumerate([3, 7, 5, 4, 2])]
    rows = [batch.sample_ids[0] for batch in pack(samples, 10)]
    # 7 opens a row, 5 another, 4 fits the second, 3 the first, 2 opens a third.
    assert rows == [["0/0", "1/0"], ["2/0", "3/0"], ["4/0"]]


@settings(deadline=None, max_examples=60)
@given(samples_strategy, st.integers(1, 5))
def test_balance(samples: list[Sample], world_size: int) -> None:
    ranks = balance(samples, world_size)
    assert len(ranks) == world_size
    assert sorted(sample.id for rank in ranks for sample in rank) == sorted(sample.id for sample in samples)
    for rank in ranks:
        numbers = [int(sample.id.split("/")[0]) for sample in rank]
        assert numbers == sorted(numbers)
    loads = [sum(len(sample.trajectory.token_ids) for sample in rank) for rank in ranks]
    longest = max(len(sample.trajectory.token_ids) for sample in samples)
    assert max(loads) - min(loads) <= longest  # what the greedy rule guarantees
    assert balance(samples, world_size) == ranks


def test_balance_table() -> None:
    samples = [make_sample(number, length, []) for number, length in enumerate([5, 9, 4, 5, 1])]
    ranks = [[sample.id for sample in rank] for rank in balance(samples, 2)]
    # 9 → 0; 5 → 1; 5 → 1; 4 → 0; 1 → 1 (13 against 10).
    assert ranks == [["1/0", "2/0"], ["0/0", "3/0", "4/0"]]


def test_nothing_to_do() -> None:
    assert pack([], 8) == []
    assert pad([], 8) == []
    assert balance([], 2) == [[], []]
    assert count_loss_tokens([]) == 0


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="max_tokens"):
        pack([], 0)
    with pytest.raises(ValueError, match="world_size"):
        balance([], 0)
    with pytest.raises(ValueError, match="sample 3/0 has an empty prompt"):
        pack([make_sample(3, 0, [(2, 0)])], 8)
    broken = make_sample(4, 2, [(2, 0)])
    broken.trajectory.turns[0].logprobs.pop()
    with pytest.raises(ValueError, match="sample 4/0, turn 0: 1 log-probabilities for 2"):
        pad([broken], 8)


def make_model(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,  # far from uniform, so that a leak across segments would show
        tie_word_embeddings=tied,
    )
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config)


def token_logprobs(model: LlamaForCausalLM, batch: MicroBatch, use_cache: bool = False) -> Tensor:
    """[N] log-probabilities of the loss tokens: the actor's forward pass in small."""
    states = model.model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=None,
        use_cache=use_cache,
    ).last_hidden_state
    where = head_positions(batch.loss_mask, batch.segment_ids)
    hidden = states.reshape(-1, states.shape[-1])[where.predictor]
    targets = batch.input_ids.reshape(-1)[where.token]
    return chunked_logprobs(hidden, model.lm_head.weight, None, targets, 1.0, 8)[0]


def logprobs_by_sample(
    model: LlamaForCausalLM, batches: list[MicroBatch], use_cache: bool = False
) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for batch in batches:
        values = token_logprobs(model, batch, use_cache)
        owner = batch.trajectory_index[batch.loss_mask]
        for index, sample_id in enumerate(batch.trajectory_ids):
            result[sample_id] = values[owner == index]
    return result


SHAPES = [(3, [(4, 5), (2, 0)]), (7, [(1, 0)]), (1, [(1, 0)]), (5, [(6, 3), (3, 2), (2, 0)]), (2, [(9, 0)])]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_any_cut_gives_the_same_logprobs_and_gradient(tied: bool) -> None:
    """Packed, padded and one by one; against full logits of the whole model one by one."""
    model = make_model(tied)
    samples = [make_sample(number, *shape) for number, shape in enumerate(SHAPES)]
    reference: dict[str, Tensor] = {}
    for sample in samples:
        ids = torch.tensor([sample.trajectory.token_ids])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        chosen = logits.gather(1, ids[0, 1:, None]).squeeze(1)
        reference[sample.id] = chosen[torch.tensor(sample.trajectory.loss_mask)[1:]]
    parameters = list(model.parameters())
    expected = torch.autograd.grad(torch.cat(list(reference.values())).sum(), parameters)
    cuts = {"one by one": pack(samples, 1), "packed": pack(samples, 30), "padded": pad(samples, 60)}
    assert any(len(batch.sample_ids[0]) > 1 for batch in cuts["packed"])
    assert any((batch.segment_ids < 0).any() for batch in cuts["padded"])
    for name, batches in cuts.items():
        actual = logprobs_by_sample(model, batches)
        for sample_id, values in reference.items():
            torch.testing.assert_close(
                actual[sample_id], values, atol=1e-5, rtol=0, msg=f"{name} {sample_id}"
            )
        gradients = torch.autograd.grad(torch.cat(list(actual.values())).sum(), parameters)
        difference = sum((a - b).square().sum() for a, b in zip(gradients, expected, strict=True)) ** 0.5
        assert difference <= 1e-5 * sum(b.square().sum() for b in expected) ** 0.5, name


def test_a_cache_makes_transformers_leak_across_segments() -> None:
    """Why the actor must pass ``use_cache=False``. If this fails, transformers mended it."""
    model = make_model(tied=True)
    samples = [make_sample(number, *shape) for number, shape in enumerate(SHAPES)]
    with torch.no_grad():
        exact = logprobs_by_sample(model, pack(samples, 100))
        leaked = logprobs_by_sample(model, pack(samples, 100), use_cache=True)
    assert max(float((exact[key] - leaked[key]).abs().max()) for key in exact) > 1e-2


def test_empty_microbatch_gives_every_parameter_a_zero_gradient() -> None:
    model = make_model(tied=False)
    token_logprobs(model, empty_microbatch()).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_to_moves_every_tensor() -> None:
    moved = pack([make_sample(0, 2, [(2, 0)])], 8)[0].to("meta")
    tensors = (moved.input_ids, moved.position_ids, moved.segment_ids, moved.loss_mask)
    assert {t.device.type for t in (*tensors, moved.sampling_logprobs, moved.advantages)} == {"meta"}
    assert moved.sample_ids == [["0/0"]]


@given(samples=samples_strategy, budget=st.integers(1, 80), packed=st.booleans())
def test_values_of_loss_tokens_travel_by_sample(samples: list[Sample], budget: int, packed: bool) -> None:
    """The engine's log-probabilities of a batch, split by sample, are the trajectory's; ``join`` inverts."""
    for batch in (pack if packed else pad)(samples, budget):
        values = batch.sampling_logprobs[batch.loss_mask]
        parts = batch.split(values)
        for sample in samples:
            if sample.id in parts:
                expected = [value for turn in sample.trajectory.turns for value in turn.logprobs]
                assert parts[sample.id].tolist() == expected
        assert set(parts) == set(batch.trajectory_ids)
        assert torch.equal(batch.join(parts), values)


def test_without_shared_prefixes_rows_hold_what_they_may() -> None:
    """Four trajectories of 10 tokens with the same prompt of 8 fit one row of 16 only if they share it."""
    first = make_sample(0, 8, [(2, 0)])
    same = [replace(first, id=f"0/{number}") for number in range(4)]
    assert [batch.input_ids.numel() for batch in pack(same, 16)] == [40]
    whole = pack(same, 16, share_prefixes=False)
    assert [batch.input_ids.numel() for batch in whole] == [10, 10, 10, 10]
    assert all(batch.tree is None for batch in whole)
    (both,) = pack(same[:2], 20, share_prefixes=False)
    assert both.tree is not None
    assert both.tree.input_ids.tolist() == both.input_ids.tolist()
    assert both.tree.paths.tolist() == [list(range(10)), list(range(10, 20))]


def test_an_empty_micro_batch_has_no_values() -> None:
    batch = empty_microbatch()
    assert batch.split(torch.zeros(0)) == {}
    assert batch.join({}).shape == (0,)


@given(sizes=st.lists(st.integers(1, 5), max_size=9), count=st.integers(1, 12))
def test_minibatches_are_whole_groups_in_order(sizes: list[int], count: int) -> None:
    samples = [
        Sample(trajectory=make_sample(group, 1, []).trajectory, advantage=0.0, id=f"{group}/{member}")
        for group, size in enumerate(sizes)
        for member in range(size)
    ]
    parts = split_minibatches(samples, count)
    assert [sample.id for part in parts for sample in part] == [sample.id for sample in samples]
    assert len(parts) == min(count, len(sizes))
    groups = [{sample.id.partition("/")[0] for sample in part} for part in parts]
    assert sum(map(len, groups)) == len(sizes), "a group stands in one part only"
    if parts:
        assert max(map(len, groups)) - min(map(len, groups)) <= 1


def test_minibatches_need_a_count() -> None:
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        split_minibatches([], 0)
