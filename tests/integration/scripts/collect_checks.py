"""Collects two steps of every case on every rank, in a thread, beside collectives of the main thread.

``collect_checks OUT MODEL``. Unit tests use its parts.

The stand-in for the engine sits where vLLM begins; protocol, sampler, episodes and rewards are real.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, cast

import torch.distributed as dist
from transformers import PreTrainedTokenizerFast

from integration.scripts.common import write_results
from searchrl.collect import Collected, collect
from searchrl.config import EpisodeConfig, ResamplingConfig, RewardConfig, RewardKind, SamplingConfig
from searchrl.data import Sampler
from searchrl.distributed import gather_objects, init_world, side_group
from searchrl.engine import Engine, Generation, GenerationRequest
from searchrl.episodes import Rollout
from searchrl.protocol import Protocol
from searchrl.rewards import ScoredGroup, score_group
from searchrl.tools import Tool
from searchrl.trajectory import Example, Finish, Group

GROUP_SIZE = 6
KINDS = {"E": "easy", "H": "hard", "C": "coin", "S": "slow"}
"""How a question's episodes go: all right; all wrong; right or wrong, later; never over."""


class Case(NamedTuple):
    """Two steps over a stream of questions, a letter each."""

    kinds: str
    groups_per_step: int
    max_rounds: int = 1
    oversample: float = 1.0


CASES = {
    "one round": Case("CHEC CHHC", 4),
    "rounds": Case("CCHHCECC HHCCCC", 4, max_rounds=4),
    "in vain": Case("HHHEEHHH HEHECHHH", 4, max_rounds=2),
    "oversampled": Case("CSCECS SCHCSC", 4, oversample=1.5),
    "oversampled rounds": Case("CSCHHH CSCE CCSCSC", 4, max_rounds=2, oversample=1.5),
}


@dataclass
class Guesser:
    """Answers as the question's kind says; a coin falls by the request's seed."""

    tokenizer: PreTrainedTokenizerFast
    policy_version: int = 0
    running: int = 0
    questions: list[str] = field(default_factory=list)

    async def generate(self, request: GenerationRequest) -> Generation:
        question = str(self.tokenizer.decode(request.prompt_ids))
        self.questions.append(question)
        self.running += 1
        try:
            if KINDS["S"] in question:
                await asyncio.Event().wait()
            for _ in range(20 if KINDS["C"] in question else 0):
                await asyncio.sleep(0)
        finally:
            self.running -= 1
        right = KINDS["E"] in question or (KINDS["C"] in question and request.seed % 2 == 1)
        ids = self.tokenizer.encode(f"<answer>{'yes' if right else 'no'}</answer>", add_special_tokens=False)
        return Generation(token_ids=ids, logprobs=[-0.5] * len(ids), finish=Finish.STOP)


def stream(kinds: str, *, seed: int = 0) -> list[Example]:
    """Examples that a sampler with this seed draws in the order of ``kinds``."""
    letters = kinds.replace(" ", "")
    blank = [
        Example(id=str(n), question="", golden_answers=("yes",), data_source="t") for n in range(len(letters))
    ]
    order = [example.id for _, example in Sampler(blank, seed=seed).take(len(letters))]
    questions = dict(zip(order, letters, strict=True))
    return [
        Example(
            id=e.id, question=f"{KINDS[questions[e.id]]} {e.id}", golden_answers=("yes",), data_source="t"
        )
        for e in blank
    ]


@dataclass
class Player:
    """Plays groups with the real ``Rollout``."""

    engine: Guesser
    runner: asyncio.Runner = field(default_factory=asyncio.Runner)

    def __call__(
        self, questions: Sequence[tuple[int, Example]], is_enough: Callable[[Group], bool]
    ) -> list[Group]:
        limits = EpisodeConfig(prompt_template="{question}", deadline_s=20.0)
        rollout = Rollout(
            engine=cast(Engine, self.engine),
            protocol=Protocol(self.engine.tokenizer, limits),
            tool=cast(Tool, None),  # nobody searches
            limits=limits,
            seed=1,
        )
        groups = rollout.groups(
            questions, group_size=GROUP_SIZE, sampling=SamplingConfig(), is_enough=is_enough
        )
        return self.runner.run(groups)


def exact(groups: Sequence[Group]) -> list[ScoredGroup]:
    """Groups scored by exact match."""
    return [score_group(group, RewardConfig(kind=RewardKind.em), "") for group in groups]


def collected(
    case: Case, player: Player, sampler: Sampler, process_group: dist.ProcessGroup | None = None
) -> Collected:
    """One step."""
    return collect(
        sampler,
        player,
        exact,
        groups_per_step=case.groups_per_step,
        resampling=ResamplingConfig(max_rounds=case.max_rounds, oversample=case.oversample),
        group=process_group,
    )


def rewards(groups: Sequence[ScoredGroup]) -> dict[str, list[float]]:
    """By group id, a string as in JSON."""
    return {str(one.group.id): [reward.total for _, _, reward in one.survivors] for one in groups}


def main(out: Path, model: Path) -> None:
    """Run all cases."""

    def play_on(sampler: Sampler, case: Case) -> list[Collected]:
        return [collected(case, player, sampler, beside) for _ in range(2)]

    world = init_world("cpu")
    dist.init_process_group("gloo")
    beside = side_group(world.size)
    player = Player(Guesser(PreTrainedTokenizerFast.from_pretrained(model)))
    results = {}
    for name, case in CASES.items():
        sampler = Sampler(stream(case.kinds), seed=0, engine=world.engine_index, engines=world.engines)
        with ThreadPoolExecutor(1) as pool:
            playing = pool.submit(play_on, sampler, case)
            agreed = all(gather_objects(n) == [n] * world.size for n in range(100))
            steps = playing.result()
        mine = [[rewards(step.chosen), rewards(step.left_out), step.metrics] for step in steps]
        results[name] = gather_objects({"steps": mine, "sampler": sampler.state_dict(), "agreed": agreed})
    player.runner.close()
    if world.is_main:
        write_results(out, results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
