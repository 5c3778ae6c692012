"""Keys are refused in configurations, and neither the refusal nor anything else shows them."""

from __future__ import annotations

import asyncio
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from searchrl.compose import compose_config, load_config
from searchrl.config import ConfigError, JudgeConfig
from searchrl.judge import Judge
from searchrl.rewards import Claim, JudgeError
from searchrl.validation.secrets import secret_problems

CANARY = "canary-0123456789-value"
HEX = "0123456789abcdef0123456789abcdef01234567"


def problems(*overrides: str) -> list[str]:
    return list(secret_problems(compose_config(["+experiment=smoke", *overrides])[0]))


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("retrieval.web.url='http://127.0.0.1/?api_key=abc'", "retrieval.web.url"),
        ("retrieval.web.url='http://127.0.0.1/?key=abc'", "retrieval.web.url"),
        ("retrieval.web.proxy='http://me:hunter2@proxy:3128'", "retrieval.web.proxy"),
        ("retrieval.urls=['http://a:8000','http://me:hunter2@b:8000']", "retrieval.urls[1]"),
        ("+reward.kwargs.api_key=abc", "reward.kwargs.api_key"),
        ("+loss.kwargs.inner.password=abc", "loss.kwargs.inner.password"),
        ("reward.judge.model=sk-proj-abcdef0123456789abcdef", "reward.judge.model"),
        ("model.path=hf_abcdefghijklmnopqrstuvwx", "model.path"),
        (f"logger.wandb_project={HEX}", "logger.wandb_project"),
        ("name=ghp_abcdefghijklmnopqrstuvwxyz0123456789", "name"),
        (
            "reward.judge.url='http://x/v1?t=eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2ln'",
            "reward.judge.url",
        ),
        ("logger.wandb_project=AKIAIOSFODNN7EXAMPLE", "logger.wandb_project"),
        ("reward.judge.model=${oc.env:JUDGE_API_KEY}", "reward.judge.model"),
        ("episode.prompt_template='{question} ${oc.env:JUDGE_API_KEY}'", "episode.prompt_template"),
    ],
)
def test_what_looks_like_a_key_is_refused_unseen(
    override: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", CANARY)
    found = problems(override)
    assert found[0].startswith(f"{name} ")
    for problem in found:  # the run's name stands in its folder's as well
        assert "read from the environment only" in problem
        for value in (CANARY, HEX, "hunter2", "abcdef", "AKIAIO", "eyJ", "api_key=abc"):
            assert value not in problem


@pytest.mark.parametrize(
    "override",
    [
        f"model.path=cache/models--a--b/snapshots/{HEX}",  # a hub's commit
        f"checkpoint=/data/{HEX}/model",
        "retrieval.urls=['http://127.0.0.1:8000','https://search.example.org/base']",
        "name=task-sk-learn-comparison-of-things",
        "+reward.kwargs.key=answer",
        "+reward.kwargs.max_tokens=abc",
        "data.prompt_column=token_ids",
    ],
)
def test_what_only_resembles_one_is_not(override: str) -> None:
    assert problems(override) == []


def test_other_problems_are_not_told_beside_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their messages show values."""
    monkeypatch.setenv("JUDGE_API_KEY", CANARY)
    bad = ("retrieval=http", f"retrieval.urls=['ftp://{CANARY}']", "group_size=1")
    with pytest.raises(ConfigError) as refused:
        load_config(["+experiment=smoke", *bad])
    assert CANARY not in str(refused.value)
    assert "group_size" not in str(refused.value)
    assert "retrieval.urls[0] holds the value of the environment variable JUDGE_API_KEY" in str(refused.value)


@pytest.fixture
def echo() -> Iterator[str]:
    """A service that refuses, and repeats in its refusal all that it was sent."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.dumps({"error": f"bad key: {dict(self.headers)}"}).encode()
            self.send_response(401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        server.shutdown()


def test_a_judge_that_repeats_its_key_does_not_give_it_away(
    echo: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", CANARY)

    async def ask() -> object:
        judge = Judge(JudgeConfig(url=echo, model="m", cache=str(tmp_path / "cache.sqlite")))
        claim = Claim(question="q", golden_answers=("a",), answer="b")
        verdict = (await judge.verdicts([claim]))[claim]
        await judge.aclose()
        return verdict

    verdict = asyncio.run(ask())
    assert isinstance(verdict, JudgeError)
    assert "bad key" in str(verdict)  # it did repeat it
    assert CANARY not in str(verdict) + repr(verdict)
    assert CANARY.encode() not in (tmp_path / "cache.sqlite").read_bytes()
