"""The README's retrieval commands, run as written: an index is built and served, and found out when wrong."""

from __future__ import annotations

import re
import shlex
import signal
from pathlib import Path

import httpx
import pytest

from integration.launch import python, read_until, run, served_port, started

pytestmark = pytest.mark.integration

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def command(start: str) -> list[str]:
    """The README's command that begins so, with this interpreter."""
    found = re.search(rf"^    searchrl ({start} .*?)(  #.*)?$", README, re.MULTILINE)
    assert found is not None, start
    return python("searchrl.cli", shlex.split(found[1]))


@pytest.fixture(scope="module")
def workspace(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (assets / "worldfacts" / "manifest.json").exists():
        arguments = ["data", "worldfacts", "--out", assets / "worldfacts", "--wheels", assets / "wheels"]
        assert run(python("searchrl.cli", arguments), cwd=assets.parent, timeout_s=300).returncode == 0
    folder = tmp_path_factory.mktemp("workspace")
    (folder / "assets").symlink_to(assets)
    return folder


def test_an_index_is_built_served_and_searched_as_the_readme_says(workspace: Path) -> None:
    built = run(command("index build"), cwd=workspace, timeout_s=300)
    assert built.returncode == 0, built.stdout
    assert "64,011 passages" in built.stdout
    serve = [*command("serve"), "--port", "0"]  # another than the usual one, which may be taken here
    with started(serve, cwd=workspace, timeout_s=120) as server:
        port = served_port(read_until(server, "serving on port"))
        body = {"queries": ["capital of Ghana"], "topk": 3, "return_scores": True}
        found = httpx.post(f"http://127.0.0.1:{port}/retrieve", json=body, trust_env=False).json()["result"]
        assert "Accra" in found[0][0]["document"]["contents"]
        metrics = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
        assert 'searchrl_retrieval_queries_total{outcome="computed"} 1.0' in metrics
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0


def test_the_kinds_are_listed_with_their_costs(workspace: Path) -> None:
    listed = run(command("index kinds"), cwd=workspace, timeout_s=60)
    assert listed.returncode == 0
    assert re.search(r"pq_fastscan\+fp16.* 2\.02 .* 32\.28 ", listed.stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["index", "build", "--corpus", "no.jsonl", "--out", "i", "--kind", "bm25"], "no corpus at no.jsonl"),
        (
            ["serve", "--index", "nowhere", "--corpus", "assets/worldfacts/corpus.jsonl"],
            "no index at nowhere",
        ),
        (
            ["index", "build", "--corpus", "c", "--out", "i"],
            "--encoder is needed for --kind dense and hybrid",
        ),
    ],
)
def test_what_cannot_work_ends_with_one_line(workspace: Path, arguments: list[str], message: str) -> None:
    ended = run(python("searchrl.cli", arguments), cwd=workspace, timeout_s=60)
    assert ended.returncode in (1, 2)
    assert message in ended.stdout
    assert "Traceback" not in ended.stdout
