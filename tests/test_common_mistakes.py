"""Ten common mistakes and their kin: each ends in one message that says what to do, without a traceback.

The commands run as they are typed, in this process where nothing is lost by it; what needs an environment of
its own (a package that is hidden, a port that is taken) in processes of their own. ``FORBIDDEN`` is a folder
that not even root may make: a mount of the kernel's.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from integration.launch import SOURCE, environment, python
from searchrl.cli import run
from searchrl.config import ConfigError
from searchrl.errors import CleanStop, own_words

FORBIDDEN = "/sys/searchrl"


def refusal() -> str:
    """What the system says to who makes that folder: it depends on the user and on how it is mounted."""
    try:
        Path(FORBIDDEN).mkdir()
    except OSError as error:
        return str(error.strerror)
    raise AssertionError(f"{FORBIDDEN} could be made")


REFUSAL = refusal()
HEAD = "the configuration cannot run:\n  - "
EXPERIMENTS = (
    "nq_hotpotqa, nq_hotpotqa_7b, nq_hotpotqa_google, nq_hotpotqa_lora, quickstart, search_r1_paper, smoke, "
    "worldfacts, worldfacts_qwen"
)


class Mistake(NamedTuple):
    """A command, and all that it prints after ``searchrl: ``."""

    command: str
    message: str
    code: int = 2


WRONG_PATH = (
    Mistake(
        "train +experiment=smoke data.train=nope.jsonl",
        HEAD
        + "data.train=nope.jsonl does not exist; `searchrl data worldfacts` builds the quickstart's data, "
        "`searchrl data prepare` the published sets",
    ),
    Mistake(
        "train +experiment=smoke retrieval.corpus=nope.jsonl",
        HEAD
        + "retrieval.corpus=nope.jsonl does not exist; `searchrl data worldfacts` builds the quickstart's",
    ),
    Mistake(
        "train +experiment=smoke retrieval.index_path=nope",
        HEAD + "retrieval.index_path=nope holds no index (no manifest.json); make one with `searchrl index "
        "build`, or leave it empty to have one built under assets",
    ),
)

NO_RETRIEVER = (
    Mistake(
        "train +experiment=smoke retrieval=http",
        HEAD + "retrieval.urls is empty; name at least one server, for example [http://127.0.0.1:8000]",
    ),
    Mistake(
        "train +experiment=smoke retrieval=http retrieval.urls=[127.0.0.1:8000]",
        HEAD + "retrieval.urls holds '127.0.0.1:8000', which is no http:// or https:// address",
    ),
)

WRONG_KEY = (
    Mistake(
        "train +experiment=smok",
        f"there is no experiment=smok; did you mean smoke? There are {EXPERIMENTS}",
    ),
    Mistake("trian +experiment=smoke", "there is no command 'trian'; did you mean 'train'?"),
    Mistake("xyzzy", "there is no command 'xyzzy'; `searchrl --help` lists them"),
    Mistake(
        "train experiment=smoke",
        "experiment=smoke needs a plus, because there need not be an experiment: write +experiment=smoke",
    ),
    Mistake(
        "train +experiment=smoke optimiser.lr=1e-6",
        "unknown key 'optimiser.lr'; did you mean 'optimizer.lr'?",
    ),
    Mistake(
        "train +experiment=smoke +optimizer.lrr=1e-6",
        "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?",
    ),
    Mistake(
        "train +experiment=smoke reward.kwargs.a=1",
        "reward.kwargs.a=1 needs a plus, because it is an argument of your own: write +reward.kwargs.a=1",
    ),
    Mistake("train +experiment=smoke xyzzy=1", "unknown key 'xyzzy'; `searchrl config` lists all"),
    Mistake(
        "train +experiment=smoke retrieval=googel",
        "there is no retrieval=googel; did you mean google? There are bm25, brave, custom, dense, google, "
        "http, hybrid, mcp, none, oracle, replay, searxng, shuffled, wiki18",
    ),
    Mistake("train +experiment=smoke steps", "'steps' is no setting; write key=value, for example steps=10"),
    Mistake("train +experiment=smoke steps=many", "steps=many: 'many' is not a whole number"),
    Mistake(
        "train +experiment=smoke +steps=3",
        "+steps=3 needs no plus, because there is a value to replace: write steps=3",
    ),
    Mistake(
        "train +experiment=smoke retrieval.urls=http://127.0.0.1:8000",
        "retrieval.urls=http://127.0.0.1:8000: it takes a list; write [A] or [A,B], in quotes for the shell",
    ),
    Mistake(
        "train +experiment=smoke 'episode.prompt_template=Q: {question}'",
        "'episode.prompt_template=Q: {question}' cannot be read; a list is written [A,B], and text with "
        "brackets, braces, quotes, commas or equals signs in quotes of its own, inside those of the shell: "
        "'name=\"a, b\"'",
    ),
)

TOO_SMALL_CONTEXT = (
    Mistake(
        "train +experiment=smoke episode.max_context_tokens=160",
        HEAD + "an episode may need 176 tokens (2 turns of 64, 1 observations of 48) besides its prompt, but "
        "episode.max_context_tokens=160; raise it, or lower the others",
    ),
    Mistake(
        "train +experiment=smoke episode.max_context_tokens=10000",
        HEAD
        + "episode.max_context_tokens=10000 is more than the 8192 tokens that random:tiny can read; lower "
        "it, or choose another model",
    ),
)

NO_GPU = (
    Mistake(
        "train +experiment=smoke device=cuda",
        "device=cuda needs a GPU for every process, 1 in all, but the NVIDIA driver shows 0 within "
        "CUDA_VISIBLE_DEVICES=; choose device=cpu or fewer processes, or ask `searchrl doctor`",
    ),
)

NO_PERMISSION = (
    Mistake(
        f"train +experiment=smoke run_dir={FORBIDDEN}",
        f"run_dir={FORBIDDEN} cannot be written ({REFUSAL}: {FORBIDDEN}); choose another with "
        "run_dir=... or make it writable",
    ),
    Mistake(
        "train +experiment=smoke run_dir=a_file/run",
        "run_dir=a_file/run cannot be written (Not a directory: a_file/run); choose another with run_dir=... "
        "or make it writable",
    ),
    Mistake(
        f"index build --kind bm25 --corpus corpus.jsonl --out {FORBIDDEN}",
        f"/sys/.searchrl.partial: {REFUSAL}; give this user access or room there, or name another",
        1,
    ),
)

WRONG_MODEL = (
    Mistake(
        "train +experiment=smoke model.path=/nowhere/model",
        HEAD
        + "model.path=/nowhere/model: model '/nowhere/model' is no existing folder and cannot be a hub name "
        "(name or org/name); correct the path, or use one of package:minilm, package:smollm2-135m, "
        "random:tiny, random:tiny-untied",
    ),
    Mistake(
        "train +experiment=smoke model.path=random:huge",
        HEAD + "model.path=random:huge: no model is called 'random:huge'; there are package:minilm, "
        "package:smollm2-135m, random:tiny, random:tiny-untied",
    ),
    Mistake(
        "eval +experiment=smoke checkpoint=runs/old",
        HEAD
        + "checkpoint=runs/old: runs/old is not a Hugging Face checkpoint: it has no config.json; name the "
        "folder that training (runs/NAME/model) or save_pretrained wrote; did you mean runs/old/model?",
    ),
    Mistake(
        "eval +experiment=smoke checkpoint=runs/old/model",
        HEAD
        + "checkpoint=runs/old/model has no weights (*.safetensors); copy it whole, or write it again with "
        "save_pretrained",
    ),
    Mistake(
        "train +experiment=smoke model.path=model.gguf",
        HEAD + "model.path=model.gguf: model.gguf is a file; a model is a folder with config.json and "
        "*.safetensors in it",
    ),
    Mistake(
        "train +experiment=smoke model.path=nobody/nothing",
        "model.path=nobody/nothing is no folder here, and the hub cannot be asked (Cannot reach "
        "https://huggingface.co/nobody/nothing/resolve/main/config.json: offline mode is enabled. To disable "
        "it, please unset the `HF_HUB_OFFLINE` environment variable.); correct the path, or fetch the model "
        "where there is a network, with `hf download nobody/nothing`",
    ),
)

EMPTY_DATA = (
    Mistake(
        "validate +experiment=smoke data.train=empty.jsonl",
        "empty.jsonl holds no rows; build or download it again",
    ),
)

NOTHING_NAMED = (
    Mistake(
        "train",
        "the configuration cannot run:\n"
        + "".join(
            f"  - {name} is not set; give it, or start from an experiment, for example "
            "+experiment=quickstart\n"
            for name in ("model.path", "data.train", "data.eval")
        )
        + "  - retrieval.corpus is not set; name a corpus (JSONL), or choose retrieval=none or http",
    ),
    Mistake(
        "train +experiment=smoke name=old",
        "runs/old holds a run already; continue it with resume=true, or choose another name=...",
    ),
)

IN_THIS_PROCESS = (
    *WRONG_PATH,
    *NO_RETRIEVER,
    *WRONG_KEY,
    *TOO_SMALL_CONTEXT,
    *NO_GPU,
    *NO_PERMISSION,
    *WRONG_MODEL,
    *EMPTY_DATA,
    *NOTHING_NAMED,
)


@pytest.fixture(autouse=True)
def workplace(shipped_files: Path) -> Path:
    """Files that the mistakes are about, beside those that the shipped configurations name."""
    (shipped_files / "a_file").touch()
    (shipped_files / "empty.jsonl").touch()
    (shipped_files / "model.gguf").touch()
    passage = {"id": "0", "contents": '"Title"\ntext'}
    (shipped_files / "corpus.jsonl").write_text(json.dumps(passage) + "\n", encoding="utf-8")
    old = shipped_files / "runs" / "old"
    (old / "model").mkdir(parents=True)
    (old / "metrics.jsonl").touch()
    (old / "model" / "config.json").write_text("{}", encoding="utf-8")
    return shipped_files


@pytest.mark.parametrize("mistake", IN_THIS_PROCESS, ids=lambda mistake: mistake.command)
def test_a_mistake_ends_in_one_message(
    mistake: Mistake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "device=cuda" in mistake.command:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "argv", ["searchrl", *shlex.split(mistake.command)])
    with pytest.raises(SystemExit) as ended:
        run()
    printed = capsys.readouterr()
    assert printed.err == f"searchrl: {mistake.message}\n"
    assert printed.out == ""
    assert ended.value.code == mistake.code


FULL = OSError(errno.ENOSPC, "No space left on device", "runs/a/metrics.jsonl")
FULL_MESSAGE = (
    "runs/a/metrics.jsonl: No space left on device; give this user access or room there, or name another"
)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConfigError("x=1 is wrong"), ("x=1 is wrong", 2)),
        (CleanStop("it failed"), ("it failed", 1)),
        (ExceptionGroup("tasks", [ValueError("?"), ExceptionGroup("t", [FULL])]), (FULL_MESSAGE, 1)),
        (FULL, (FULL_MESSAGE, 1)),
        (OSError(errno.ENOSPC, "No space left on device"), None),  # who knows where
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), None),  # may be a bug
        (ValueError("?"), None),
        (ExceptionGroup("tasks", [ValueError("?")]), None),
    ],
)
def test_what_needs_no_traceback(error: Exception, said: tuple[str, int] | None) -> None:
    assert own_words(error) == said


def test_checks_before_a_run_leave_libraries_silent(workplace: Path) -> None:
    """They import some, which read then what they may say."""
    script = (
        "import sys; from searchrl.cli import run\n"
        "sys.argv = ['searchrl', 'validate', '+experiment=smoke', 'model.path=nobody/nothing']\n"
        "run()\n"
        "from tqdm import tqdm; list(tqdm(range(3)))\n"
        "from huggingface_hub.utils import are_progress_bars_disabled\n"
        "assert are_progress_bars_disabled()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script],
        cwd=workplace,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stderr == ""
    assert "memory: unknown until nobody/nothing is on this machine" in ended.stdout


HIDING = """\
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
"""
"""A ``sitecustomize.py`` that makes packages as good as not installed."""


@pytest.mark.parametrize(
    ("hidden", "mistake"),
    [
        (
            ("faiss",),
            Mistake(
                "train +experiment=smoke retrieval=hybrid",
                "not installed: faiss (for retrieval.index=hybrid); they come with searchrl's extra 'cpu': "
                "`make setup EXTRA=cpu` installs what was tested",
            ),
        ),
        (
            ("torch", "vllm"),
            Mistake(
                "eval +experiment=smoke",
                "not installed: torch (for the trainer), vllm (for the engine); they come with searchrl's "
                "extra 'cpu': `make setup EXTRA=cpu` installs what was tested",
            ),
        ),
    ],
    ids=lambda value: value.command if isinstance(value, Mistake) else "",
)
def test_a_missing_extra_is_named(hidden: tuple[str, ...], mistake: Mistake, workplace: Path) -> None:
    (workplace / "hiding").mkdir()
    (workplace / "hiding" / "sitecustomize.py").write_text(HIDING.format(names=hidden), encoding="utf-8")
    ended = typed(mistake.command, workplace, PYTHONPATH=f"{workplace / 'hiding'}{os.pathsep}{SOURCE}")
    assert ended.stderr == f"searchrl: {mistake.message}\n"
    assert ended.stdout == ""
    assert ended.returncode == mistake.code


def test_a_port_that_is_taken_is_named(workplace: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = typed(f"serve --index nope --corpus corpus.jsonl --port {port}", workplace)
    assert ended.stderr == (
        f"searchrl serve: cannot listen on 127.0.0.1 port {port}: Address already in use; choose another "
        "--port (0: any free one), or end what listens there\n"
    )
    assert ended.returncode == 2


@pytest.mark.integration
@pytest.mark.parametrize(
    ("overrides", "said", "message"),
    [
        (
            "data.train_hops=[] retrieval=http retrieval.urls=[http://127.0.0.1:9] retrieval.deadline_s=1 "
            "retrieval.timeout_s=1",
            "retriever: http://127.0.0.1:9, waited for up to retrieval.deadline_s=1 s\n",
            r"http://127\.0\.0\.1:9/health cannot be reached: .*; start it \(`searchrl serve`\), or correct "
            r"retrieval\.urls",
        ),
        (
            "data.train_hops=[3]",
            "",
            r"data\.train_hops=\[3\] leaves none of the 1 questions of assets/worldfacts/train\.jsonl, whose "
            r"metadata\.hops are 0 \(0: not given\); name some of these, or \[\] for all",
        ),
    ],
)
def test_what_only_a_run_finds_out_it_finds_before_anything_loads(
    overrides: str, said: str, message: str, workplace: Path
) -> None:
    ended = typed(f"train +experiment=smoke {overrides}", workplace)
    plan, _, rest = ended.stdout.partition("\n")
    assert plan.startswith("plan: ")
    assert rest == said, ended.stderr
    assert re.fullmatch(f"searchrl: {message}\n", ended.stderr)
    assert ended.returncode == 2


def typed(command: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """``searchrl COMMAND`` in a process of its own."""
    return subprocess.run(
        python("searchrl.cli", shlex.split(command)),
        cwd=folder,
        env=environment() | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
