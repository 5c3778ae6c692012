"""Train with a reward of one's own, evaluate, and look at answers, in one script.

From the folder that holds ``assets`` (``searchrl data worldfacts`` makes it)::

    python examples/script.py

The quickstart and one evaluation more; ``main("smoke", {}, name="script")`` shows in minutes that everything
works, and answers noise.
"""

from __future__ import annotations

from searchrl import Evaluation, TrainingResult, evaluate, open_policy, train
from searchrl.answers import exact_match
from searchrl.trajectory import Example, Trajectory


def thrifty(trajectory: Trajectory, example: Example, *, cost: float) -> float:
    """Exact match, less ``cost`` for every search."""
    return exact_match(trajectory.answer, example.golden_answers) - cost * trajectory.num_searches


def main(experiment: str, settings: dict[str, object], *, name: str) -> tuple[TrainingResult, Evaluation]:
    """Train, evaluate on other questions than during training, and print what the policy does."""
    trained = train(experiment, {**settings, "+reward.kwargs.cost": 0.05}, name=name, reward=thrifty)
    rewards = [record["reward/mean"] for record in trained.metrics if "reward/mean" in record]
    print(f"reward: {rewards[0]:.3f} in the first step, {rewards[-1]:.3f} in the last")
    if trained.before is not None:
        print(f"exact match: {trained.before.exact_match} before, {trained.after.exact_match} after")

    held_out = evaluate(trained.model, experiment, {**settings, "eval.questions": 0}, name=f"{name}-all")
    for source, interval in held_out.by_source.items():
        print(f"{source}: {interval} of {held_out.questions} questions")

    with open_policy(trained.model, experiment, settings) as policy:
        for group in policy.rollout(policy.questions[:2], samples=2, temperature=1.0):
            for trajectory in group.trajectories:
                queries = [turn.call.query for turn in trajectory.turns if turn.call is not None]
                print(f"{group.example.question} {queries} -> {trajectory.answer} ({trajectory.outcome})")
    return trained, held_out


if __name__ == "__main__":
    main("quickstart", {}, name="script")
