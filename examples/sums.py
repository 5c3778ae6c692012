"""Questions of one's own: sums in words, for ``examples/calculator.py``.

``prompt`` tells the policy what its search tags are for. ``metadata`` is for the warm start, which shows how:
one search, for ``gold_queries``, then the answer. A model that follows such a prompt by itself needs none.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from examples.calculator import calculate

PROMPT = "Calculate, for example <search>12 * 7 + 5</search>, then answer: <answer>89</answer>.\n"
PROBLEMS = {
    "A hall has {} rows of {} seats, and {} seats are taken. How many are free?": "{} * {} - {}",
    "{} boxes hold {} eggs each, and {} eggs lie beside them. How many eggs are there?": "{} * {} + {}",
}


def main(folder: Path) -> None:
    """Write ``train.jsonl`` with 2,000 questions and ``test.jsonl`` with 500 others."""
    rng, terms = random.Random(0), {}
    while len(terms) < 2500:
        question, numbers = rng.choice(list(PROBLEMS)), rng.sample(range(11, 100), 3)
        terms[question.format(*numbers)] = PROBLEMS[question].format(*numbers)
    rows = [
        {
            "id": f"sum-{number}",
            "question": question,
            "golden_answers": [str(calculate(term))],
            "data_source": "sums",
            "prompt": PROMPT + question,
            "metadata": {"hops": 1, "gold_queries": [term]},
        }
        for number, (question, term) in enumerate(terms.items())
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", rows[:2000]), ("test", rows[2000:])):
        lines = "".join(f"{json.dumps(row)}\n" for row in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
