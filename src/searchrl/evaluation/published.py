"""Exact match that papers report on the seven benchmarks, each row with its source.

All rows share Search-R1's setting: trained on NQ and HotpotQA, wiki-18 with E5, three documents a search,
whole evaluation sets.
"""

from __future__ import annotations

from dataclasses import dataclass

BENCHMARKS = {
    "nq": 3610,
    "triviaqa": 11313,
    "popqa": 14267,
    "hotpotqa": 7405,
    "2wikimultihopqa": 12576,
    "musique": 2417,
    "bamboogle": 125,
}
"""Published order, and questions of the set that the papers evaluate (PROTOCOL §3)."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Published:
    """One row of a paper's table."""

    system: str
    source: str
    average: float
    """As printed: the unweighted mean over the seven sets."""
    exact_match: tuple[float, ...] | None = None
    """In the order of ``BENCHMARKS``; None if only the average is at hand."""


_SEARCH_R1 = "arXiv 2503.09516v5, table 3"

PUBLISHED = (
    Published(
        system="Search-R1 GRPO, Qwen2.5-3B",
        source=_SEARCH_R1,
        exact_match=(0.421, 0.583, 0.413, 0.297, 0.274, 0.066, 0.128),
        average=0.312,
    ),
    Published(
        system="Search-R1 GRPO, Qwen2.5-3B-Instruct",
        source=_SEARCH_R1,
        exact_match=(0.397, 0.565, 0.391, 0.331, 0.310, 0.124, 0.232),
        average=0.336,
    ),
    Published(
        system="Search-R1 PPO, Qwen2.5-3B",
        source=_SEARCH_R1,
        exact_match=(0.406, 0.587, 0.435, 0.284, 0.273, 0.049, 0.088),
        average=0.303,
    ),
    Published(
        system="Search-R1 PPO, Qwen2.5-3B-Instruct",
        source=_SEARCH_R1,
        exact_match=(0.341, 0.545, 0.378, 0.324, 0.319, 0.103, 0.264),
        average=0.325,
    ),
    Published(system="GSPO + LLDS, Qwen2.5-3B", source="arXiv 2512.04220", average=0.451),
    Published(
        system="Search-R1 GRPO, Qwen2.5-7B",
        source=_SEARCH_R1,
        exact_match=(0.395, 0.560, 0.388, 0.326, 0.297, 0.125, 0.360),
        average=0.350,
    ),
    Published(
        system="Search-R1 GRPO, Qwen2.5-7B-Instruct",
        source=_SEARCH_R1,
        exact_match=(0.429, 0.623, 0.427, 0.386, 0.346, 0.162, 0.400),
        average=0.396,
    ),
    Published(
        system="Search-R1 PPO, Qwen2.5-7B",
        source=_SEARCH_R1,
        exact_match=(0.480, 0.638, 0.457, 0.433, 0.382, 0.196, 0.432),
        average=0.431,
    ),
    Published(
        system="Search-R1 PPO, Qwen2.5-7B-Instruct",
        source=_SEARCH_R1,
        exact_match=(0.393, 0.610, 0.397, 0.370, 0.414, 0.146, 0.368),
        average=0.385,
    ),
)
