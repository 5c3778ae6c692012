"""The Tab key, in a real bash at a real terminal."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import time
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from example import CONF
from searchrl.cli import _FLAG_COMMANDS, _HYDRA_COMMANDS, main
from searchrl.completion import words
from searchrl.config.reference import group_options, known_keys, sections

COMMANDS = {*_HYDRA_COMMANDS, *(name for name, *_ in _FLAG_COMMANDS)}
GROUPS = group_options(CONF)


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In a folder with a file and a folder that can be completed."""
    path = tmp_path_factory.mktemp("completion") / "script.bash"
    with path.open("w", encoding="utf-8") as file, redirect_stdout(file):
        main(["completion", "bash"])
    path.with_name("my model").mkdir()
    path.with_name("corpus.jsonl").touch()
    return path


def offered(script: Path, line: str) -> list[str]:
    """What bash is told for a line with the cursor at its end; outside of a prompt it refuses ``compopt``."""
    program = (
        f"source {script.name}; COMP_LINE=$1 COMP_POINT=${{#1}}; compopt() {{ :; }}; _searchrl; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", program, "bash", line],
        cwd=script.parent,
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    assert done.stderr == ""
    return sorted(done.stdout.split("\n")[:-1])


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("searchrl ", sorted(COMMANDS)),
        ("searchrl wa", ["warmstart"]),
        ("searchrl completion ", ["bash"]),
        ("searchrl train opt", ["optimizer."]),
        ("searchrl train optimizer.w", ["optimizer.warmup_steps=", "optimizer.weight_decay="]),
        ("searchrl train model", ["model.", "model="]),
        ("searchrl train model.lora.", [f"model.lora.{name}=" for name in ("alpha", "rank", "targets")]),
        ("searchrl train model=qwen2.5-3", ["qwen2.5-3b"]),
        ("searchrl train device=", ["cpu", "cuda"]),
        ("searchrl doctor overlap=t", ["true"]),
        ("searchrl validate steps=3 +exp", ["+experiment="]),
        (
            "searchrl eval +experiment=nq_hotpotqa_",
            ["nq_hotpotqa_7b", "nq_hotpotqa_google", "nq_hotpotqa_lora"],
        ),
        ("searchrl config logger=wandb", ["wandb", "wandb_offline"]),
        ("searchrl train checkpoint=my", ["my model"]),
        ("searchrl train retrieval.corpus=c", ["corpus.jsonl"]),
        ("searchrl serve --corpus c", ["corpus.jsonl"]),
        ("searchrl train nothing_like_it", [""]),
    ],
)
def test_what_is_offered(line: str, expected: list[str], script: Path) -> None:
    assert offered(script, line) == expected


def test_the_cursor_may_stand_before_the_end(script: Path) -> None:
    """What is right of it does not count."""
    cursor = "COMP_LINE='searchrl train steps=3' COMP_POINT=12"
    program = f"source {script.name}; {cursor}; _searchrl; echo ${{COMPREPLY[0]}}"
    done = subprocess.run(
        ["bash", "-c", program], cwd=script.parent, capture_output=True, text=True, check=True
    )
    assert done.stdout == "train\n"


def test_every_word_is_an_override() -> None:
    """Composed all at once but for options of groups, which test_config composes one by one."""
    known = {*known_keys(), "experiment"}
    assert {word.lstrip("+").partition("=")[0] for word in words()} == {
        key for key in known if key not in {section.key for section in sections()} or key in GROUPS
    }
    assert len(set(words())) == len(words()) > 200


def test_tab_completes_at_a_prompt(script: Path) -> None:
    """A key without a space behind it, then the option of a group; the file with one."""
    master, slave = pty.openpty()
    environment = {"PATH": os.environ["PATH"], "PS1": "ready> ", "TERM": "dumb", "HOME": str(script.parent)}
    bash = subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-i"],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=environment,
        cwd=script.parent,
        start_new_session=True,
    )
    os.close(slave)

    def press(keys: str, until: str) -> str:
        os.write(master, keys.encode())
        seen, deadline = "", time.monotonic() + 20
        while until not in seen:
            assert select.select([master], [], [], deadline - time.monotonic())[0], seen
            seen += os.read(master, 65536).decode()
        return seen

    press('eval "$(cat script.bash)"; echo done | tr d D\n', "Done")
    press("searchrl tr\t", "searchrl train ")
    press("optimizer.l\t", "optimizer.lr=")
    press("1e-5 +exp\t", "1e-5 +experiment=")
    press("qu\t", "quickstart ")
    press("checkpoint=my\t", "checkpoint=my\\ model/")
    press("\x15exit\n", "exit")
    assert bash.wait(timeout=20) == 0
    os.close(master)
