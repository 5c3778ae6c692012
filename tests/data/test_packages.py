from __future__ import annotations

import sys
from pathlib import Path

import pytest

from searchrl.data import DataError, fetch_wheel


@pytest.mark.parametrize("name", ["some_pkg-1.2-py3-none-any.whl", "Some.Pkg-1.2-py3-none-any.whl"])
def test_a_wheel_that_is_there_is_not_fetched(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    (tmp_path / "some_pkg-1.3-py3-none-any.whl").touch()
    assert fetch_wheel("some-pkg==1.2", tmp_path) == tmp_path / name


@pytest.mark.parametrize("requirement", ["pkg", "pkg>=1", "--index-url=x", "pkg==1 other==2", "../pkg==1"])
def test_only_exact_requirements_are_accepted(tmp_path: Path, requirement: str) -> None:
    with pytest.raises(DataError, match="name==version"):
        fetch_wheel(requirement, tmp_path)


def test_a_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DataError, match=r"cannot download no-such-package==0\.1.*by hand"):
        fetch_wheel("no-such-package==0.1", tmp_path)


def test_pip_that_leaves_nothing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/true")
    with pytest.raises(DataError, match="left no wheel"):
        fetch_wheel("some-pkg==1.2", tmp_path)
