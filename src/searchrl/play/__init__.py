"""`searchrl play`: ask a policy at the terminal and watch it search, or act in its place. docs/play.md."""

from __future__ import annotations

import argparse

_DESCRIPTION = """\
Ask a policy a question and watch it think, search and answer; or, with --human, be the policy.

  searchrl play +experiment=quickstart checkpoint=runs/quickstart/model
  searchrl play +experiment=quickstart checkpoint=runs/quickstart/model --question "Where is Accra?"
  searchrl play +experiment=quickstart --human --random
"""


def argument_parser() -> argparse.ArgumentParser:
    """What stands behind ``searchrl play``; `parse_intermixed_args` takes flags between the overrides."""
    parser = argparse.ArgumentParser(
        prog="searchrl play", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, as for eval")
    parser.add_argument(
        "--human", action="store_true", help="you type the policy's turns; no model is loaded, tokens only"
    )
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--question", metavar="TEXT", help="ask this and end")
    asked.add_argument("--example", metavar="ID", help="ask this question of data.eval, score it, and end")
    asked.add_argument("--random", action="store_true", help="the same with any question of data.eval")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="of sampling; default: %(default)s, greedy as in eval"
    )
    return parser
