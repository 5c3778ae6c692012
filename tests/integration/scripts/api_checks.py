"""Several runs in one process, as a script makes them: a rollout, examples/script.py, more training.

Arguments: the folder for results, which becomes the current one.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

from examples.script import main

from integration.scripts.common import write_results
from searchrl import rollout, train
from searchrl.environment import prepare_environment
from searchrl.errors import SearchrlError
from searchrl.trajectory import Example, Trajectory

SETTINGS: dict[str, object] = {
    "model.path": "random:tiny",
    "data": {"train": "questions.jsonl", "eval": "questions.jsonl", "train_hops": [1]},
    "retrieval.corpus": "corpus.jsonl",
    "warmstart.demonstrations": 0,
    "episode": {"prompt_template": "{question}, please", "max_turn_tokens": 16, "max_context_tokens": 256},
    "steps": 1,
    "groups_per_step": 2,
    "group_size": 2,
    "saving.every": 0,
    "eval.questions": 1,
    "engine.kv_cache_gib": 0.0625,
}


OURS = ("engine", "heartbeat", "rollout", "retrieval-monitor")
"""How the names of threads begin that runs start."""


def by_length(trajectory: Trajectory, example: Example) -> float:
    """Something that varies, whatever a random policy says."""
    del example
    return sum(map(len, (turn.text for turn in trajectory.turns))) / 1000


def left() -> dict[str, Any]:
    """What a run could leave in its process, and with it."""
    import torch.distributed as dist

    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    commands = [Path(f"/proc/{pid}/cmdline").read_bytes().decode() for pid in children]
    return {
        "variables": [name for name in ("RANK", "WORLD_SIZE", "MASTER_PORT") if name in os.environ],
        "groups": dist.is_initialized(),
        "children": [command for command in commands if "searchrl" in command],
        "threads": [name for thread in threading.enumerate() if (name := thread.name).startswith(OURS)],
    }


def check(out: Path) -> dict[str, Any]:
    """One after another in this process."""
    results: dict[str, Any] = {}
    answered = rollout(["Who? " * 3, "Where?"], None, "smoke", SETTINGS, samples=2, temperature=1.0)
    results["rollout"] = [
        [[turn.text for turn in one.turns] for one in group.trajectories] for group in answered
    ]
    results["questions"] = [group.example.question for group in answered]
    results["left"] = [left()]

    trained, held_out = main("smoke", SETTINGS, name="script")
    results["left"].append(left())
    results["model"] = sorted(path.name for path in trained.model.iterdir())
    results["steps"] = [record["step"] for record in trained.metrics]
    results["searches"] = [record.get("reward/search_cost") for record in trained.metrics]
    assert trained.before is not None
    for name, evaluation in (("before", trained.before), ("after", trained.after), ("held out", held_out)):
        match = evaluation.exact_match
        results[name] = {
            "questions": evaluation.questions,
            "interval": [match.low, match.value, match.high],
            "sources": list(evaluation.by_source),
        }

    again = train("smoke", {**SETTINGS, "checkpoint": trained.model}, name="again", reward=by_length)
    results["left"].append(left())
    results["again"] = again.metrics
    config = (again.run_dir / "config.yaml").read_text(encoding="utf-8")
    results["reward"] = [line for line in config.splitlines() if "import_path: _" in line]
    try:
        train("smoke", SETTINGS, name="again")
    except SearchrlError as error:
        results["refused"] = [type(error).__name__, str(error)]
    results["run directories"] = sorted(path.name for path in (out / "runs").iterdir())
    return results


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    os.chdir(folder)
    prepare_environment("cpu")
    write_results(folder, check(folder))
