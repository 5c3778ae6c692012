"""What of an episode is shown at a terminal: every line says who wrote it, with colour and without."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.text import Text

from searchrl.protocol import Protocol
from searchrl.rewards import ScoredGroup
from searchrl.trajectory import Document, Example, Provenance, Trajectory

_STYLES = {
    Provenance.PROMPT: "dim",
    Provenance.SAMPLED: "bold cyan",
    Provenance.OBSERVATION: "green",
    Provenance.INSERTED: "yellow",
}
_WIDTH = max(map(len, Provenance))
_SHOWN_CHARS = 160
"""Of a document's text."""
_SHOWN_TOKENS = 12
"""At either end of a run of tokens that the policy did not choose."""

# Besides control characters: what reorders a line (bidirectional controls), or breaks it like "\\n".
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Text that a terminal only prints: what could move the cursor or reorder a line is written out."""
    return _UNSAFE.sub(lambda match: match.group().encode("unicode_escape").decode(), text)


class Screen:
    """Writes blocks of lines, each line behind the name of who wrote it: ``sampled     | …``."""

    def __init__(self) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # whatever the terminal's encoding lacks
        self._rich = Console(highlight=False, soft_wrap=True)
        self._open: Provenance | None = None

    def say(self, text: str, style: str = "") -> None:
        """A line of the program's own."""
        self.close()
        self._put(text + "\n", style)

    def write(self, who: Provenance, text: str) -> None:
        """More of ``who``'s block, which begins if another is open. ``text`` may be any part of a line."""
        if self._open is not who:
            self.close()
            self._gutter(who)
            self._open = who
        for number, line in enumerate(text.split("\n")):
            if number:
                self._put("\n")
                self._gutter(who)
            self._put(visible(line), _STYLES[who])

    def close(self) -> None:
        """End the open block."""
        if self._open is not None:
            self._put("\n")
            self._open = None

    def documents(self, documents: Sequence[Document], seconds: float) -> None:
        """What a search found: titles, scores, and how their texts begin."""
        found = f"{len(documents)} document{'s' * (len(documents) != 1)}" if documents else "nothing"
        lines = [f"found {found} in {seconds:.2f} s"]
        for rank, document in enumerate(documents, 1):
            text = " ".join(document.text.split())
            shown = text[:_SHOWN_CHARS] + "…" * (len(text) > _SHOWN_CHARS)
            lines.append(f"{rank}. {' '.join(document.title.split())}  (score {document.score:.3f})  {shown}")
        self.write(Provenance.OBSERVATION, "\n".join(lines))
        self.close()

    def ending(self, trajectory: Trajectory, seconds: float) -> None:
        """How the episode went."""
        searches = trajectory.num_searches
        self.say(f"answer:  {'none' if trajectory.answer is None else visible(trajectory.answer)}", "bold")
        self.say(
            f"outcome: {trajectory.outcome}, {searches} search{'es' * (searches != 1)}, "
            f"{trajectory.num_sampled} sampled tokens, {seconds:.1f} s"
        )
        if trajectory.error is not None:
            self.say(f"void, neither scored nor trained on: {visible(trajectory.error)}", "red")

    def score(self, scored: ScoredGroup, example: Example) -> None:
        """Gold answers, and the reward of the group's one trajectory, with its parts."""
        self.say(f"gold:    {visible(', '.join(example.golden_answers))}")
        (reward,) = scored.rewards
        if reward is None:
            self.say(f"reward:  none ({visible(str(scored.error(0)))})", "red")
            return
        parts = {name: value for name, value in reward.components.by_name().items() if value}
        sum_ = " ".join(f"{value:+.3g} {name}" for name, value in parts.items())
        self.say(f"reward:  {reward.total:.3g}" + (f" = {sum_}" if sum_ else ""), "bold")
        facts = {
            "exact match": reward.exact_match == 1.0,
            "judged correct": reward.judged,
            "valid format": reward.valid_format,
            "gold answer read": reward.retrieval_hit,
            "all gold passages read": reward.evidence,
        }
        known = [f"{name}: {'yes' if value else 'no'}" for name, value in facts.items() if value is not None]
        self.say("         " + ", ".join(known))

    def stream(self, trajectory: Trajectory, protocol: Protocol) -> None:
        """The tokens by who wrote them, and which of them a loss would see."""
        ids, trained = trajectory.token_ids, trajectory.num_sampled
        self.say(f"token stream: {len(ids)} tokens, {trained} of them in the loss (1), the others not (0)")
        rows = zip(ids, trajectory.provenance, trajectory.loss_mask, strict=True)
        for (who, has_loss), run in groupby(rows, key=lambda row: row[1:]):
            pieces = [_piece(protocol, id_) for id_, _, _ in run]
            count = len(pieces)
            if not has_loss and count > 2 * _SHOWN_TOKENS:
                pieces = [*pieces[:_SHOWN_TOKENS], "…", *pieces[-_SHOWN_TOKENS:]]
            self._put(f"{int(has_loss)} {who:<{_WIDTH}} {count:>4} | ")
            self._put("·".join(pieces) + "\n", _STYLES[who])

    def _gutter(self, who: Provenance) -> None:
        self._put(f"{who:<{_WIDTH}} | ", "dim")

    def _put(self, text: str, style: str = "") -> None:
        # Its own escapes are all that rich adds: `visible` has taken care of those in the text.
        self._rich.print(Text(text, style=style), end="")
        self._rich.file.flush()


class Unfolding:
    """Token ids that grow, as text: what is new of it, in whole characters."""

    def __init__(self, protocol: Protocol) -> None:
        self._protocol = protocol
        self._shown = 0

    def more(self, token_ids: Sequence[int], *, is_last: bool = False) -> str:
        """Text that has not been shown. A character whose bytes are not all there waits for the others."""
        text = self._protocol.decode(token_ids)
        end = len(text) if is_last else len(text.rstrip("\ufffd"))
        new, self._shown = text[self._shown : end], max(self._shown, end)
        return new


def _piece(protocol: Protocol, token_id: int) -> str:
    return visible(protocol.decode([token_id]).replace("\n", "\\n"))
