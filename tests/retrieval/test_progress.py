from __future__ import annotations

import pytest

from searchrl.retrieval.progress import progress


def test_without_a_terminal_there_are_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From 1,000 of 4,000 on, 100 every 10 s after a minute: 10/s, the remaining 2,700 take 270 s."""
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    with progress("encode passages", 4000, done=1000) as on_rows:
        for seconds in (60, 10, 10):
            clock[0] += seconds
            on_rows(100)
    assert capsys.readouterr().err == "encode passages: 1,300 of 4,000 (32%), 10/s, 4 min left\n"


def test_it_can_be_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("encode passages", 10, enabled=False) as on_rows:
        on_rows(10)
    assert capsys.readouterr() == ("", "")
