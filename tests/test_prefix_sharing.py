"""Shared prefixes are computed once and change nothing: log-probabilities and gradients stay the same."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from searchrl.attention import ALONG_PATHS, attend_along_paths
from searchrl.batching import MicroBatch, pack
from searchrl.config import ConfigError
from searchrl.policy import PolicyModel, token_outputs
from searchrl.trajectory import Finish, Outcome, Sample, Trajectory, Turn


def sample(name: str, prompt: list[int], *turns: tuple[list[int], list[int]]) -> Sample:
    made = [
        Turn(
            token_ids=sampled,
            logprobs=[-0.5] * len(sampled),
            text="",
            finish=Finish.STOP,
            policy_version=0,
            observation_ids=observed,
        )
        for sampled, observed in turns
    ]
    trajectory = Trajectory(prompt_ids=prompt, turns=made, outcome=Outcome.ANSWERED, answer="")
    return Sample(trajectory=trajectory, advantage=float(len(name)) - 2.5, id=name)


GROUP = [
    sample("a", [1, 2, 3], ([4, 5], [6, 7, 8]), ([9, 10], [])),
    sample("bb", [1, 2, 3], ([4, 5], [6, 7, 8]), ([9, 11], [])),  # same search, another answer
    sample("ccc", [1, 2, 3], ([4, 12], [6, 7, 8]), ([9, 10], [])),  # another query, same documents
    sample("dddd", [1, 2, 3], ([4, 5], [6, 7, 8]), ([9, 10], [])),  # the very same as "a"
    sample("eeeee", [20, 2, 3], ([4, 5], [])),  # another prompt
]


def network_config(attention: str = "sdpa") -> LlamaConfig:
    return LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=attention,  # type: ignore[call-arg]  # of every configuration
    )


@pytest.fixture(scope="module")
def policy() -> PolicyModel:
    torch.manual_seed(0)
    return PolicyModel(LlamaForCausalLM(network_config(ALONG_PATHS)), temperature=1.0, chunk_size=8)


def gradients(policy: PolicyModel, batches: list[MicroBatch]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Log-probabilities by sample, and the gradient of Σ advantage · log-probability."""
    policy.zero_grad()
    logprobs: dict[str, Tensor] = {}
    for batch in batches:
        outputs = token_outputs(policy, batch)
        (outputs.logprobs * batch.advantages.flatten()[outputs.positions.token]).sum().backward()
        owner = batch.trajectory_index.flatten()[outputs.positions.token]
        for index, name in enumerate(batch.trajectory_ids):
            logprobs[name] = outputs.logprobs.detach()[owner == index]
    return logprobs, [p.grad.clone() for p in policy.parameters() if p.grad is not None]


def test_sharing_changes_neither_logprobs_nor_gradients(policy: PolicyModel) -> None:
    shared = pack(GROUP, max_tokens=64)
    alone = [batch for item in GROUP for batch in pack([item], max_tokens=64)]
    assert len(shared) == 1
    assert shared[0].tree is not None
    assert all(batch.tree is None for batch in alone)
    logprobs, gradient = gradients(policy, shared)
    expected_logprobs, expected_gradient = gradients(policy, alone)
    for name, values in expected_logprobs.items():
        torch.testing.assert_close(logprobs[name], values, rtol=0, atol=1e-5)
    for ours, theirs in zip(gradient, expected_gradient, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_rows_without_shared_prefixes_hold_trajectories_apart(policy: PolicyModel) -> None:
    (packed,) = pack(GROUP, max_tokens=64, share_prefixes=False)
    (expected,) = pack(GROUP, max_tokens=64)
    assert packed.tree is not None
    assert packed.tree.input_ids.shape[1] == sum(len(item.trajectory.token_ids) for item in GROUP)
    logprobs, _ = gradients(policy, [packed])
    for name, values in gradients(policy, [expected])[0].items():
        torch.testing.assert_close(logprobs[name], values, rtol=0, atol=1e-5)


def test_a_packed_row_is_never_read_as_one_sequence(policy: PolicyModel) -> None:
    (batch,) = pack(GROUP, max_tokens=64)
    with pytest.raises(ValueError, match="sdpa"):
        token_outputs(PolicyModel(LlamaForCausalLM(network_config()), temperature=1.0, chunk_size=8), batch)
    batch.tree = None
    with pytest.raises(ValueError, match="tree"):
        token_outputs(policy, batch)


def test_a_window_shorter_than_a_trajectory_is_refused() -> None:
    states = torch.zeros(1, 2, 6, 4)
    paths = torch.tensor([[0, 1, 2, 3], [0, 1, 4, 5]])
    place = torch.tensor([0, 1, 2, 3, 6, 7])
    attend_along_paths(
        torch.nn.Module(), states, states, states, None, paths=paths, place=place, sliding_window=4
    )
    with pytest.raises(ConfigError, match="attends to 3 tokens at most, but a trajectory has up to 4"):
        attend_along_paths(
            torch.nn.Module(), states, states, states, None, paths=paths, place=place, sliding_window=3
        )


def test_a_group_computes_only_its_distinct_prefixes() -> None:
    (batch,) = pack(GROUP[:4], max_tokens=64)
    assert batch.tree is not None
    # 3 prompt; 4; 5 678 9 10 / 11; 12 678 9 10
    assert batch.tree.input_ids.shape[1] == 3 + 1 + 6 + 1 + 6
    assert batch.input_ids.shape[1] == 4 * 10


tokens = st.lists(st.integers(0, 3), min_size=1, max_size=5)


@given(st.lists(st.tuples(tokens, tokens), min_size=2, max_size=6), st.integers(4, 40))
def test_every_token_keeps_its_own_prefix(pairs: list[tuple[list[int], list[int]]], budget: int) -> None:
    samples = [sample(str(i), [7], (sampled, []), (more, [])) for i, (sampled, more) in enumerate(pairs)]
    batches = pack(samples, max_tokens=budget)
    assert sorted(name for batch in batches for name in batch.trajectory_ids) == sorted(s.id for s in samples)
    for batch in batches:
        assert batch.tree is None or batch.tree.input_ids.shape[1] <= max(budget, 11)
        if batch.tree is None:
            continue
        tree = batch.tree
        ids = tree.input_ids[0]
        assert tree.paths.flatten()[tree.place].tolist() == list(range(len(ids)))
        ends = torch.diff(batch.segment_ids[0], append=torch.tensor([-1])).nonzero().flatten().tolist()
        starts = [0, *(end + 1 for end in ends)]
        for path, start, end in zip(tree.paths, starts, ends, strict=False):
            nodes = path[: end + 1 - start]
            assert nodes.tolist() == tree.node_of[start : end + 1].tolist()
            assert ids[nodes].tolist() == batch.input_ids[0, start : end + 1].tolist()
            assert tree.position_ids[0, nodes].tolist() == list(range(len(nodes)))
        assert all(a < b for a, b in itertools.pairwise(starts))
