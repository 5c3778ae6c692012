"""The server behind ``--watch``: news only when there are some, and for this machine alone."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from report.generated import make_run
from searchrl.report.errors import ReportError
from searchrl.report.live import HOST, make_app, serve
from searchrl.report.rundir import RunReader


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", steps=1, groups=2, size=2)


@pytest.fixture
def client(run: Path) -> TestClient:
    return TestClient(make_app([RunReader(run)]), base_url=f"http://{HOST}:8321")


def test_data_is_sent_when_it_is_new(run: Path, client: TestClient) -> None:
    first = client.get("/data").json()
    assert first["runs"][0]["steps"] == [1]
    assert client.get(f"/data?have={first['version']}").status_code == 204
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "reward/mean": 1.0}\n')
    second = client.get(f"/data?have={first['version']}").json()
    assert second["runs"][0]["steps"] == [1, 2]
    assert client.get("/data?have=nonsense").json()["version"] == second["version"]


def test_a_page_may_still_ask_for_what_it_knows_of(run: Path, client: TestClient) -> None:
    """Between a new state and the page's next question: the chunk of the state before is still there."""
    (before,) = client.get("/data").json()["runs"][0]["chunks"]
    path = run / "trajectories/step-000001.rank0.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:2]) + "\n")
    (after,) = client.get("/data").json()["runs"][0]["chunks"]
    assert before != after
    assert [len(client.get(f"/chunks/0/{name}").json()) for name in (before, after)] == [2, 1]
    assert client.get("/chunks/0/none").status_code == 404


def test_the_page_may_connect_to_its_server_alone(client: TestClient) -> None:
    assert "connect-src 'self'" in client.get("/").text


@pytest.mark.parametrize("path", ["/", "/data", "/chunks/0/x"])
def test_requests_under_another_name_are_refused(client: TestClient, path: str) -> None:
    """A site whose name points to 127.0.0.1 would else read the run through a visitor's browser."""
    assert client.get(path, headers={"Host": "evil.example"}).status_code == 400


def test_a_taken_port_is_refused(run: Path) -> None:
    with socket.socket() as other:
        other.bind((HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ReportError, match=f"port {port} cannot be used .*choose another"):
            serve([RunReader(run)], port=port)
