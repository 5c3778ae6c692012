"""A language model that decides whether answers are correct, behind an OpenAI-compatible endpoint.

It is asked about what exact match leaves open (`rewards.open_claims`): all answers of a step at once, equal
ones once, and with a cache never again. A judge that fails gives no verdict, not the verdict "wrong".

The answer is text of the policy inside the judge's prompt, and a policy learns what makes a judge say yes. It
is cut, put on one line, and all that could end its place in the template is escaped; what it *says* remains.
Watch ``reward/judge`` beside ``reward/exact_match``.
"""

from __future__ import annotations

import asyncio
import random
import re
import sqlite3
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from searchrl.config import JudgeConfig
from searchrl.errors import SearchrlError
from searchrl.retrieval.transport import Retriable
from searchrl.retrieval.types import RetrievalError
from searchrl.retrieval.web_engine import JsonApi, secret
from searchrl.rewards import Claim, JudgeError

KEY_VARIABLE = "JUDGE_API_KEY"
MAX_ATTEMPTS = 5
MAX_ANSWER_CHARS = 300
"""An answer is short; what is longer is cut, visibly."""

_MAX_PAUSE_S = 30.0
_MAX_REPLY_TOKENS = 8
_PLACEHOLDER = re.compile(r"\{(question|golden_answers|answer)\}")
_INERT = str.maketrans({char: f"&#{ord(char)};" for char in "<>[]|"})
_JITTER = random.Random()  # its own: retries must not advance a seeded global generator
_BUSY_TIMEOUT_S = 60.0


class JudgeCacheError(SearchrlError, RuntimeError):
    """The file of verdicts cannot be used: damaged, no database, not writable."""


def render(template: str, claim: Claim) -> str:
    """The judge's prompt. Nothing in a claim can look like a tag, a special token or a placeholder."""
    answer = claim.answer[:MAX_ANSWER_CHARS] + "…" * (len(claim.answer) > MAX_ANSWER_CHARS)
    values = {
        "question": _inert(claim.question),
        "golden_answers": "; ".join(map(_inert, claim.golden_answers)),
        "answer": _inert(answer),
    }
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)


def parse_verdict(reply: str) -> bool:
    """Yes or no, in any case, with or without a full stop.

    Raises:
        JudgeError: the reply is anything else.
    """
    match reply.strip().removesuffix(".").lower():
        case "yes":
            return True
        case "no":
            return False
        case _:
            raise JudgeError(f"the judge's reply {reply[:80]!r} is neither yes nor no")


class Judge:
    """Asks the endpoint, under one event loop. Close it there."""

    def __init__(self, config: JudgeConfig, *, first_pause_s: float = 0.5) -> None:
        """Open the cache; nothing is asked yet.

        Args:
            config: endpoint, limits, template.
            first_pause_s: before a second attempt; doubled with each further one.

        Raises:
            ConfigError: the key in the environment cannot be sent.
            JudgeCacheError: the cache cannot be used.
        """
        key = secret(KEY_VARIABLE, required=False)
        self._config = config
        self._first_pause_s = first_pause_s
        self._url = f"{config.url.rstrip('/')}/chat/completions"
        self._api = JsonApi(
            f"the judge at {urlsplit(config.url).netloc}",
            headers={"Authorization": f"Bearer {key}"} if key else {},
            proxy="",
        )
        self._cache = _Cache(Path(config.cache), config.model) if config.cache else None

    async def verdicts(self, claims: Collection[Claim]) -> dict[Claim, bool | JudgeError]:
        """Judge all claims, at most ``max_concurrency`` at once.

        Returns:
            For every claim the verdict, or why there is none after all attempts.

        Raises:
            JudgeCacheError: the cache cannot be used any more.
        """
        prompts = {claim: render(self._config.prompt_template, claim) for claim in claims}
        known: dict[str, bool | JudgeError] = {}
        if self._cache is not None:
            known |= self._cache.read(set(prompts.values()))
        slots = asyncio.Semaphore(self._config.max_concurrency)

        async def ask(prompt: str) -> bool | JudgeError:
            async with slots:
                try:
                    return await self._ask(prompt)
                except JudgeError as error:
                    return error

        missing = sorted(set(prompts.values()) - known.keys())
        found = dict(zip(missing, await asyncio.gather(*map(ask, missing)), strict=True))
        if self._cache is not None:
            self._cache.write((p, verdict) for p, verdict in found.items() if isinstance(verdict, bool))
        known |= found
        return {claim: known[prompt] for claim, prompt in prompts.items()}

    async def aclose(self) -> None:
        """Close connections and cache."""
        await self._api.aclose()
        if self._cache is not None:
            self._cache.close()

    async def _ask(self, prompt: str) -> bool:
        """One verdict, after as many attempts as it takes and are allowed."""
        pause = self._first_pause_s
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                return parse_verdict(await self._reply(prompt))
            except Retriable as error:
                if attempt == MAX_ATTEMPTS:
                    raise JudgeError(f"{error} (attempt {attempt}, the last)") from error
                await asyncio.sleep(max(error.retry_after_s, pause) * _JITTER.uniform(1.0, 1.5))
                pause = min(2 * pause, _MAX_PAUSE_S)
            except RetrievalError as error:  # how the shared transport calls what no retry mends
                raise JudgeError(str(error)) from error
        raise AssertionError("the last attempt returns or raises")

    async def _reply(self, prompt: str) -> str:
        answer = await self._api.call(
            "POST",
            self._url,
            timeout_s=self._config.timeout_s,
            body={
                "model": self._config.model,
                "messages": [{"role": "user", "content": prompt}],
                "temperature": 0,
                "max_tokens": _MAX_REPLY_TOKENS,
            },
        )
        match answer:
            case {"choices": [{"message": {"content": str(reply)}}, *_]}:
                return reply
        raise self._api.bad("no text at choices[0].message.content")


def _inert(text: str) -> str:
    """One line without a character that tags and special tokens are made of, and that can be sent."""
    printable = "".join(char if char.isprintable() else " " for char in text)
    return " ".join(printable.split()).translate(_INERT)


class _Cache:
    """Verdicts by model and prompt, in one file for all ranks and runs. For one thread at a time."""

    def __init__(self, path: Path, model: str) -> None:
        self._path = path
        self._model = model
        with self._translated():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, check_same_thread=False)
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS verdicts (model TEXT, prompt TEXT, correct INTEGER NOT NULL, "
                "PRIMARY KEY (model, prompt)) WITHOUT ROWID"
            )

    def read(self, prompts: Iterable[str]) -> dict[str, bool]:
        """The verdicts on those prompts that have one."""
        query = "SELECT correct FROM verdicts WHERE model = ? AND prompt = ?"
        with self._translated():
            rows = {p: self._connection.execute(query, (self._model, p)).fetchone() for p in prompts}
        return {prompt: bool(row[0]) for prompt, row in rows.items() if row is not None}

    def write(self, verdicts: Iterable[tuple[str, bool]]) -> None:
        """Add verdicts in one transaction; of two on the same prompt the older stands."""
        rows = [(self._model, prompt, correct) for prompt, correct in verdicts]
        with self._translated(), self._connection:
            self._connection.executemany("INSERT OR IGNORE INTO verdicts VALUES (?, ?, ?)", rows)

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise JudgeCacheError(
                f"reward.judge.cache={self._path} cannot be used: {error}; move it away, or name another file"
            ) from error
