from __future__ import annotations

import pytest

from searchrl.retrieval.progress import progress


def test_without_a_terminal_there_are_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From 1,000 of 4,000 on, 100 every 10 s: 10/s, so after 20 s 2,800 are left, 280 s or 5 min."""
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    with progress("encode passages", 4000, done=1000) as on_rows:
        for _ in range(3):
            clock[0] += 10
            on_rows(100)
    assert capsys.readouterr().err == "encode passages: 1,200 of 4,000 (30%), 10/s, 5 min left\n"


def test_it_can_be_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("encode passages", 10, enabled=False) as on_rows:
        on_rows(10)
    assert capsys.readouterr() == ("", "")
