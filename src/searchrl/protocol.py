"""The text protocol: what a prompt looks like, what a turn means, what an observation may contain.

The only user of the tokenizer during rollouts. Token ids flow in one direction: the engine's sampled ids
are decoded here to be *parsed*, and what the environment says is encoded here, once. Nothing is re-encoded.

Retrieved text cannot act: tags and special-token strings in it are escaped, and special tokens are never
parsed out of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searchrl.config import EpisodeConfig
from searchrl.data.errors import DataError
from searchrl.trajectory import Document, Example, Message, ToolCall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TAGS = ("think", "search", "information", "answer")
STOP_STRINGS = ("</search>", "</answer>")

_CHARS_PER_TOKEN = 16
"""A document longer than this many characters for each token that an observation may have is cut before it is
encoded: a megabyte takes a tokenizer seconds, some texts minutes. English has four to five."""

# Innermost pair: a stray opening tag before the real one must not become part of the query.
_ACTION = re.compile(r"<(search|answer)>((?:(?!<(?:search|answer)>).)*?)</\1>", re.DOTALL)
_TAG = re.compile(rf"<(\s*/?\s*(?:{'|'.join(TAGS)})\s*)>", re.IGNORECASE)
_FEEDBACK = (
    "\n\nThat was not a complete action. Write either one search query inside the search tags, "
    "or the final answer inside the answer tags.\n\n"
)


@dataclass(kw_only=True, slots=True, frozen=True)
class Search:
    """The turn asks for a search."""

    call: ToolCall


@dataclass(kw_only=True, slots=True, frozen=True)
class Answer:
    """The turn answers."""

    text: str


@dataclass(kw_only=True, slots=True, frozen=True)
class Invalid:
    """The turn contains no complete action."""


Action = Search | Answer | Invalid


def parse_action(text: str, max_query_chars: int) -> Action:
    """The first complete action in a turn's sampled text, by position. An empty query is no action."""
    for match in _ACTION.finditer(text):
        body = match.group(2).strip()
        if match.group(1) == "search":
            # Servers refuse a NUL; a policy must not be able to void its own trajectory.
            body = body.replace("\x00", " ").strip()
        if match.group(1) == "answer":
            return Answer(text=body)
        if body:
            call = ToolCall(query=body[:max_query_chars], truncated=len(body) > max_query_chars)
            return Search(call=call)
    return Invalid()


@dataclass(kw_only=True, slots=True, frozen=True)
class Rendered:
    """Text of the environment and the ids that encode it."""

    text: str
    token_ids: list[int]


class Protocol:
    """Renders prompts, observations and feedback as token ids; decodes and parses turns."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: EpisodeConfig) -> None:
        self._tokenizer = tokenizer
        self._config = config
        added = [str(token) for token in tokenizer.added_tokens_encoder]
        self._special_ids = frozenset(tokenizer.all_special_ids)
        self.eos_text = str(tokenizer.eos_token)
        names = sorted({*added, *map(str, tokenizer.all_special_tokens)}, key=len, reverse=True)
        # Added tokens that are plain words or white space ("  ") are text like any other.
        marks = [name for name in names if re.search(r"[<>\[\]|]", name)]
        self._marks = re.compile("|".join(map(re.escape, marks)), re.IGNORECASE) if marks else None

    def prompt(self, example: Example) -> list[int]:
        """The prompt's ids: messages through the chat template if there is one, else their plain text.

        One user message with the question in the configured template, unless the example brings its own
        prompt. Raises ``DataError`` if the chat template refuses the messages that it brings.
        """
        messages = example.prompt
        if messages is None:
            question = self.inert(example.question.strip())
            text = self._config.prompt_template.replace("{question}", question)
            messages = (Message(role="user", content=text),)
        else:
            messages = tuple(
                Message(role=message.role, content=self._own_words(message.content)) for message in messages
            )
        if not self._tokenizer.chat_template:
            return self._encode("\n\n".join(message.content for message in messages))
        return self._through_template(messages, example)

    def _through_template(self, messages: Sequence[Message], example: Example) -> list[int]:
        from jinja2 import TemplateError

        chat = [{"role": message.role, "content": message.content} for message in messages]
        try:
            ids: Any = self._tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except TemplateError as error:
            raise DataError(
                f"the model's chat template refuses the prompt of {example.id} with the roles "
                f"{[message.role for message in messages]} ({error}); change the prompts, or leave "
                "data.prompt_column empty"
            ) from error
        return [int(i) for i in ids]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of sampled ids, special tokens included."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def written(self, text: str, *, ends: bool) -> list[int]:
        """Ids of a turn that a person wrote in the policy's place; special tokens in it are plain text.

        Args:
            text: the turn.
            ends: whether the message ends behind it: the end-of-message token follows.
        """
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return [*self._encode(text), *([int(self._tokenizer.eos_token_id)] if ends else [])]

    def parse(self, text: str) -> Action:
        """The turn's action; ``text`` is the decoded text of *sampled* ids only."""
        return parse_action(text, self._config.max_query_chars)

    def feedback(self) -> Rendered:
        """What the environment says after a turn without a complete action. Contains no tag."""
        return Rendered(text=_FEEDBACK, token_ids=self._encode(_FEEDBACK))

    def observation(self, documents: Sequence[Document]) -> Rendered:
        """Documents as an information block of at most ``max_observation_tokens`` tokens.

        Each document is one line. Bodies are cut, longest first, so that the closing tag survives.
        """
        opening, closing = self._encode("\n\n<information>"), self._encode("\n</information>\n\n")
        lines = [self._encode(self._line(rank, document)) for rank, document in enumerate(documents, 1)]
        if not lines:
            lines = [self._encode("\nNo documents were found.")]
        budget = self._config.max_observation_tokens - len(opening) - len(closing)
        ids = [*opening]
        for line, allowance in zip(lines, _fair_cut([len(line) for line in lines], budget), strict=True):
            ids += line[:allowance]
        ids += closing
        return Rendered(text=self.decode(ids), token_ids=ids)

    def inert(self, text: str) -> str:
        """Text in which no tag and no special token is left: their angle brackets are escaped.

        Half a surrogate pair, which no tokenizer takes, becomes U+FFFD.
        """
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        # Encoding may lose a byte that the vocabulary lacks; without it "<sea\x04rch>" would be a tag.
        return self._without_marks(self.decode(self._encode(self._without_marks(text))))

    def _own_words(self, text: str) -> str:
        """Text of a ready prompt: special tokens are escaped, tags stay.

        Its author shows the policy the protocol's tags on purpose, and nothing can act through a prompt:
        turns are parsed from sampled text alone. A special token would forge the end of a message, whoever
        wrote it.
        """
        return self._without_special(self.decode(self._encode(self._without_special(text))))

    def _without_marks(self, text: str) -> str:
        return self._without_special(_TAG.sub(lambda match: f"&lt;{match.group(1)}&gt;", text))

    def _without_special(self, text: str) -> str:
        if self._marks is None:
            return text
        return self._marks.sub(lambda match: _escape(match.group()), text)

    def _line(self, rank: int, document: Document) -> str:
        title = " ".join(document.title.split())
        body = " ".join(document.text.split())
        limit = _CHARS_PER_TOKEN * self._config.max_observation_tokens
        return "\n" + self.inert(f"Doc {rank}(Title: {title}) {body}"[:limit])

    def _encode(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        if forged := self._special_ids.intersection(ids):
            raise ValueError(f"special tokens {sorted(forged)} were parsed out of text: {text[:200]!r}")
        return [int(i) for i in ids]


def load_tokenizer(model: Path | str) -> PreTrainedTokenizerBase:
    """The model's tokenizer."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    return tokenizer


def _escape(mark: str) -> str:
    """Break a special-token string visibly: every bracket and bar becomes an HTML entity."""
    return "".join(f"&#{ord(char)};" if char in "<>[]|" else char for char in mark)


def _fair_cut(lengths: Sequence[int], budget: int) -> list[int]:
    """Allowances that sum to at most ``budget``; only what is longer than its fair share is cut."""
    allowances = [0] * len(lengths)
    left = max(budget, 0)
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for done, i in enumerate(order):
        allowances[i] = min(lengths[i], left // (len(lengths) - done))
        left -= allowances[i]
    return allowances
