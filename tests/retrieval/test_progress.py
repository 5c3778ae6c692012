from __future__ import annotations

import pytest

from searchrl.retrieval.progress import progress


def test_without_a_terminal_there_are_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From 1,000 of 4,000 on, 100 to begin with and 500 in the next minute: 2,400 are left, 288 s."""
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    with progress("encode passages", 4000, done=1000) as on_rows:
        for rows in (100, 500):
            clock[0] += 60
            on_rows(rows)
    assert capsys.readouterr().err == "encode passages: 1,600 of 4,000 (40%), 8/s, 5 min left\n"


def test_it_can_be_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("encode passages", 10, enabled=False) as on_rows:
        on_rows(10)
    assert capsys.readouterr() == ("", "")
