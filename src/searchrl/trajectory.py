"""What an episode leaves behind: one append-only stream of token ids, each with its provenance.

Every token is stored once, by whoever produced it. Nothing here is ever re-tokenised, and the loss
mask is not a second record beside the tokens: it *is* their provenance.

Example, a question answered after one search (letters stand for token ids)::

    prompt_ids        P P P
    turns[0]                S S S | O O O O      sampled "<search>…</search>", then what the tool returned
    turns[1]                                S S  sampled "<answer>…</answer>"
    token_ids         P P P S S S   O O O O S S
    loss_mask         0 0 0 1 1 1   0 0 0 0 1 1
    logprobs          0 0 0 l l l   0 0 0 0 l l

Alignment, stated once: index ``t`` holds everything about token ``t``; its log-probability is given all
tokens before it. The one shift by a position happens in ``algorithm.logprobs``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Provenance(StrEnum):
    """Who produced a token. Only ``SAMPLED`` tokens carry loss."""

    PROMPT = "prompt"
    SAMPLED = "sampled"
    OBSERVATION = "observation"
    """What a tool returned."""
    INSERTED = "inserted"
    """What the environment said of its own accord: feedback on an invalid turn, a last-turn note."""


class Finish(StrEnum):
    """Why the engine stopped generating a turn."""

    STOP = "stop"
    """A stop string (``</search>`` or ``</answer>``) was completed."""
    EOS = "eos"
    """The model ended its message."""
    LENGTH = "length"
    """The turn's token limit was reached."""


class Outcome(StrEnum):
    """How an episode ended. ``TOOL_FAILED`` and ``ABORTED`` are void: never scored, never trained on."""

    ANSWERED = "answered"
    NO_ANSWER = "no_answer"
    TURN_LIMIT = "turn_limit"
    """The forced-answer turn produced no answer."""
    TOKEN_LIMIT = "token_limit"
    """A turn ran into ``max_turn_tokens``."""
    CONTEXT_LIMIT = "context_limit"
    """The next turn did not fit ``max_context_tokens``."""
    TOOL_FAILED = "tool_failed"
    """A search failed for infrastructure reasons."""
    ABORTED = "aborted"
    """It still ran at ``episode.deadline_s``."""

    @property
    def is_void(self) -> bool:
        """True if the episode says nothing about the policy."""
        return self in (Outcome.TOOL_FAILED, Outcome.ABORTED)


@dataclass(kw_only=True, slots=True, frozen=True)
class Message:
    """One message of a chat."""

    role: str
    """``system``, ``user`` or ``assistant``."""
    content: str


@dataclass(kw_only=True, slots=True, frozen=True)
class Example:
    """One row of a data set."""

    id: str
    question: str
    golden_answers: tuple[str, ...]
    data_source: str
    metadata: dict[str, object] = field(default_factory=dict)
    prompt: tuple[Message, ...] | None = None
    """A prompt that the data set brings along, to be used instead of the configured template."""

    @property
    def hops(self) -> int:
        """How many facts an answer needs, where the data says so (``metadata.hops``), else 0."""
        hops = self.metadata.get("hops", 0)
        return hops if isinstance(hops, int) else 0

    @property
    def gold_passages(self) -> tuple[str, ...]:
        """Ids of the passages that an answer rests on (``metadata.gold_passages``); empty: not known."""
        passages = self.metadata.get("gold_passages", [])
        return tuple(map(str, passages)) if isinstance(passages, list) else ()


@dataclass(kw_only=True, slots=True, frozen=True)
class Document:
    """One retrieved passage, as the corpus holds it: ``contents`` is a title in quotes, then text."""

    id: str
    contents: str
    score: float

    @property
    def title(self) -> str:
        """The first line without its quotes."""
        return self.contents.partition("\n")[0].strip().strip('"')

    @property
    def text(self) -> str:
        """Everything after the first line."""
        return self.contents.partition("\n")[2]


class SearchStatus(StrEnum):
    """How a search ended. Only the first two are results; the others are a ``RetrievalError``."""

    OK = "ok"
    EMPTY = "empty"
    """The search worked and found nothing."""
    ERROR = "error"
    TIMEOUT = "timeout"
    RATE_LIMITED = "rate_limited"


@dataclass(kw_only=True, slots=True, frozen=True)
class ToolCall:
    """A tool call parsed from sampled text."""

    query: str
    truncated: bool = False
    """The query was longer than the protocol allows and was cut."""


@dataclass(kw_only=True, slots=True, frozen=True)
class ToolResult:
    """What the tool returned: documents, possibly none. A failure is an exception, never a result."""

    documents: tuple[Document, ...]
    seconds: float

    @property
    def status(self) -> SearchStatus:
        """``ok``, or ``empty`` if nothing was found."""
        return SearchStatus.OK if self.documents else SearchStatus.EMPTY


@dataclass(kw_only=True, slots=True)
class Turn:
    """One generation and what the environment appended after it."""

    token_ids: list[int]
    """[S] sampled ids, verbatim from the engine, the stop token included."""
    logprobs: list[float]
    """[S] log-probabilities under the distribution really sampled from, verbatim from the engine."""
    text: str
    """The decoded sampled ids; for parsing, rewards and transcripts only."""
    finish: Finish
    policy_version: int
    observation_ids: list[int] = field(default_factory=list)
    """[E] tokens the environment appended; empty after the last turn."""
    observation_provenance: Provenance = Provenance.OBSERVATION
    observation_text: str = ""
    """The text that ``observation_ids`` encode; for transcripts only."""
    call: ToolCall | None = None
    result: ToolResult | None = None
    is_invalid: bool = False
    """The turn contains no complete action."""

    @property
    def shown_documents(self) -> tuple[Document, ...]:
        """What the policy got to read: nothing if the observation no longer fitted the context."""
        return self.result.documents if self.result is not None and self.observation_ids else ()


@dataclass(kw_only=True, slots=True)
class Trajectory:
    """A finished episode."""

    prompt_ids: list[int]
    turns: list[Turn]
    outcome: Outcome
    answer: str | None
    """The text inside the last complete ``<answer>``, stripped; None if there was none."""
    error: str | None = None
    """Why the episode is void, if it is."""

    @property
    def token_ids(self) -> list[int]:
        """[T] the whole stream: prompt, then each turn's sampled and appended tokens."""
        ids = list(self.prompt_ids)
        for turn in self.turns:
            ids += turn.token_ids
            ids += turn.observation_ids
        return ids

    @property
    def provenance(self) -> list[Provenance]:
        """[T] who produced each token."""
        tags = [Provenance.PROMPT] * len(self.prompt_ids)
        for turn in self.turns:
            tags += [Provenance.SAMPLED] * len(turn.token_ids)
            tags += [turn.observation_provenance] * len(turn.observation_ids)
        return tags

    @property
    def loss_mask(self) -> list[bool]:
        """[T] True where the policy chose the token."""
        return [tag is Provenance.SAMPLED for tag in self.provenance]

    @property
    def logprobs(self) -> list[float]:
        """[T] the engine's log-probabilities at sampled tokens; 0.0 elsewhere, where none exists."""
        values = [0.0] * len(self.prompt_ids)
        for turn in self.turns:
            values += turn.logprobs
            values += [0.0] * len(turn.observation_ids)
        return values

    @property
    def num_searches(self) -> int:
        """Executed searches."""
        return sum(turn.result is not None for turn in self.turns)

    @property
    def num_sampled(self) -> int:
        """Sampled tokens, that is loss tokens."""
        return sum(len(turn.token_ids) for turn in self.turns)

    @property
    def is_overlong(self) -> bool:
        """True if a token or context limit cut the episode: its reward says little about what was sampled.

        Overlong filtering, DAPO (arXiv 2503.14476, section 3.4).
        """
        return self.outcome in (Outcome.TOKEN_LIMIT, Outcome.CONTEXT_LIMIT)

    @property
    def has_void_turn(self) -> bool:
        """True if a turn holds no complete action, neither a search nor an answer.

        Void-turn filtering, SimpleTIR (arXiv 2509.02479).
        """
        return any(turn.is_invalid for turn in self.turns)


@dataclass(kw_only=True, slots=True)
class Group:
    """The episodes of one example that are compared with one another."""

    id: int
    """Unique within a run: the question's position in the sampler's stream, not a data set's own index."""
    example: Example
    trajectories: list[Trajectory]


@dataclass(kw_only=True, slots=True, frozen=True)
class Sample:
    """All that training needs of one trajectory."""

    trajectory: Trajectory
    advantage: float
    id: str
    """``group/index``, named in error messages."""
