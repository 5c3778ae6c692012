"""Every shipped configuration composes, every bad one is refused with a message that says what to do."""

from __future__ import annotations

import ast
import json
import re
from copy import deepcopy
from dataclasses import fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import searchrl.config
from example import CONF
from searchrl.checkpoint import CheckpointError
from searchrl.cli import _claim_run_dir, main, run
from searchrl.compose import config_folder, load_config
from searchrl.config import (
    Config,
    ConfigError,
    EpisodeConfig,
    ModelConfig,
    RetrievalConfig,
    RetrievalKind,
    settings_to_keep,
)
from searchrl.explain import explain
from searchrl.validation import validate

GROUPS = sorted(
    (path.parent.name, path.stem) for path in CONF.glob("*/*.yaml") if path.parent.name != "experiment"
)
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
HEAD = "the configuration cannot run:\n"
RANKS = {"nq_hotpotqa": 4, "nq_hotpotqa_google": 4, "nq_hotpotqa_7b": 8, "search_r1_paper": 8}
"""How many ranks an experiment is made for; others: one."""
FITS = {
    "nq_hotpotqa_lora": 24,
    "worldfacts_qwen": 16,
    "worldfacts": 16,
    "quickstart": 16,
    "smoke": 16,
    "nq_hotpotqa_7b": 80,
    "search_r1_paper": 80,
}
"""GiB of the hardware that an experiment's comment names."""


@pytest.fixture(autouse=True)
def workplace(shipped_files: Path) -> Path:
    """A folder to work in, with files where the shipped configurations look for data."""
    return shipped_files


def problems(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides)
    return str(caught.value)


@cache
def smoke() -> Config:
    return load_config(["+experiment=smoke"])[0]


def valid() -> Config:
    """A configuration without a problem, as plain objects."""
    return deepcopy(smoke())


# --- what is shipped ------------------------------------------------------------------------------------


def assert_holds(cfg: Any, given: Any) -> None:
    """Every value of a YAML file stands in the composed configuration."""
    for key, value in given.items():
        found = getattr(cfg, str(key))
        if is_dataclass(found):
            assert_holds(found, value)
        else:
            assert found == (tuple(value) if isinstance(found, tuple) else value), key


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes(name: str) -> None:
    cfg, resolved = load_config([f"+experiment={name}"])
    given = OmegaConf.to_container(OmegaConf.load(CONF / "experiment" / f"{name}.yaml"))
    assert isinstance(given, dict)
    given.pop("defaults")
    assert_holds(cfg, given)
    assert cfg.name == name
    assert cfg.run_dir == f"runs/{name}"
    assert set(resolved) == {entry.name for entry in fields(Config)}


@pytest.mark.parametrize(("group", "option"), GROUPS)
def test_every_option_of_every_group_composes(
    group: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a-key-for-tests")
    (tmp_path / "recording.sqlite").touch()
    needed = {
        "http": "retrieval.urls=[http://127.0.0.1:8000]",
        "searxng": "retrieval.web.url=http://127.0.0.1:8080",
        "mcp": "retrieval.web.url=http://127.0.0.1:8080/mcp",
        "replay": f"retrieval.cache={tmp_path}/recording.sqlite",
        "custom": "retrieval.import_path=examples.calculator:Calculator",
        "judge": "reward.judge={url: 'http://127.0.0.1:8001/v1', model: m}",
    }
    more = [needed[option]] if option in needed else []
    cfg, _ = load_config(["+experiment=smoke", f"{group}={option}", *more], training=option != "oracle")
    loaded = OmegaConf.load(CONF / group / f"{option}.yaml")
    around = {"assets": "assets", "run_dir": "runs/smoke"}
    given = OmegaConf.to_container(OmegaConf.merge(around, loaded), resolve=True)
    assert isinstance(given, dict)
    for name in around:
        given.pop(name)
    assert given
    is_global = (
        (CONF / group / f"{option}.yaml").read_text(encoding="utf-8").startswith("# @package _global_")
    )
    assert_holds(cfg if is_global else getattr(cfg, group), given)


def test_no_file_of_the_folder_was_forgotten() -> None:
    assert len(GROUPS) + len(EXPERIMENTS) + 1 == len(list(CONF.rglob("*.yaml")))
    assert {"quickstart", "smoke"} <= set(EXPERIMENTS)
    assert config_folder().resolve() == CONF.resolve()


def test_overrides_win_over_the_experiment() -> None:
    cfg, resolved = load_config(["steps=7", "+experiment=smoke", "optimizer.betas=[0.5,0.75]", "name=x"])
    assert (cfg.steps, list(cfg.optimizer.betas), cfg.run_dir) == (7, [0.5, 0.75], "runs/x")
    assert resolved["optimizer"]["betas"] == [0.5, 0.75]


def test_every_field_has_a_docstring() -> None:
    """A value nobody explained is a value nobody can set."""
    folder = Path(searchrl.config.__file__).parent
    files = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.py"))]
    missing, seen = [], 0
    for node in (node for tree in files for node in tree.body):
        if not isinstance(node, ast.ClassDef) or not node.name.endswith("Config"):
            continue
        for here, below in zip(node.body, [*node.body[1:], None], strict=True):
            if not isinstance(here, ast.AnnAssign):
                continue
            name = ast.unparse(here.target)
            if node.name == "Config" and ast.unparse(here.annotation).endswith("Config"):
                continue  # a section, explained by its class
            seen += 1
            documented = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            if not documented or not str(ast.literal_eval(below.value)).strip():  # type: ignore[union-attr]
                missing.append(f"{node.name}.{name}")
    assert missing == []
    assert seen > 110


# --- what is refused: by the types ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stepz=3", "unknown key 'stepz'; did you mean 'steps'?"),
        ("optimizer.lrr=1", "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?"),
        ("+group_sise=3", "unknown key 'group_sise'; did you mean 'group_size'?"),
        ("xyzzy=1", "unknown key 'xyzzy'; `searchrl config` lists all"),
        ("steps=many", "steps=many: 'many' is not a whole number"),
        ("steps=1.5", "steps=1.5: '1.5' is not a whole number"),
        ("steps=", "steps=: no value; give a whole number"),
        ("steps=null", "steps=null: it cannot be left empty"),
        ("optimizer.lr=high", "optimizer.lr=high: 'high' is not a number"),
        ("overlap=maybe", "overlap=maybe: 'maybe' is not true or false"),
        ("device=tpu", "device=tpu: choose one of cpu, cuda"),
        (
            "reward.kind=f1",
            "reward.kind=f1: choose one of em, em_plus_format, em_plus_evidence, search_r1, custom, "
            "custom_group",
        ),
        ("loss.kind=[1]", "loss.kind=[1]: Value [1] (list) is not a valid input for <enum 'LossKind'>"),
        (
            "retrieval.urls=http://a",
            "retrieval.urls=http://a: it takes a list; write [A] or [A,B], in quotes for the shell",
        ),
        (
            "optimizer=3",
            "optimizer=3: it is a section of settings; set one of them, for example optimizer.lr=1e-6",
        ),
        (
            "steps=1,2",
            "steps=1,2 names several values; a list is written [A,B], text with commas in quotes",
        ),
        ("+steps=3", "+steps=3 needs no plus, because there is a value to replace: write steps=3"),
        (
            "+data=worldfacts",
            "+data=worldfacts needs no plus, because there is a value to replace: write data=worldfacts",
        ),
        ("model=tini", "there is no model=tini; did you mean tiny? There are "),
        ("model=xyzzy", "there is no model=xyzzy; there are "),
        ("run_dir=${nothing}", "Interpolation key 'nothing' not found, in run_dir"),
        ("steps", "'steps' is no setting; write key=value, for example steps=10"),
        ("name=[a", "'name=[a' cannot be read; a list is written [A,B], and text with brackets"),
    ],
)
def test_unknown_keys_and_wrong_types(override: str, message: str) -> None:
    said = problems("+experiment=smoke", override)
    assert said.startswith(message)
    assert "\n" not in said


def test_what_is_not_recognised_is_passed_on() -> None:
    error = KeyError("outer")
    error.__cause__ = ValueError("inner\nsecond line")
    assert explain(error, ["steps=3"], ["steps"]) == "'outer'\ninner"


# --- what is refused: by validation ---------------------------------------------------------------------

TOO_LONG = (
    "an episode may need 176 tokens (2 turns of 64, 1 observations of 48) besides its prompt, but "
    "episode.max_context_tokens=176; raise it, or lower the others"
)
RENORMALISE = "truncates the distribution that rollouts sample from, but the loss does not renormalise;"


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["sampling.top_p=0.95"], f"sampling.top_p=0.95 {RENORMALISE} set it to 1"),
        (["sampling.top_k=50"], f"sampling.top_k=50 {RENORMALISE} set it to 0 (off)"),
        (["group_size=1"], "group_size=1 leaves nothing to compare within a group; use at least 2"),
        (["episode.max_context_tokens=176"], TOO_LONG),
        (
            ["episode.max_observation_tokens=31"],
            "episode.max_observation_tokens=31 leaves no room for documents between the tags; "
            "use at least 32",
        ),
        (
            ["retrieval.corpus=''"],
            "retrieval.corpus is not set; name a corpus (JSONL), or choose retrieval=none or http",
        ),
        (
            ["retrieval.corpus=no.jsonl"],
            "retrieval.corpus=no.jsonl does not exist; `searchrl data worldfacts` builds the quickstart's",
        ),
        (
            ["retrieval.index=dense", "retrieval.encoder_family=e6"],
            "retrieval.encoder_family=e6 is unknown; choose one of minilm, e5, bge",
        ),
        (
            ["retrieval.kind=http"],
            "retrieval.urls is empty; name at least one server, for example [http://127.0.0.1:8000]",
        ),
        (
            ["retrieval.kind=http", "retrieval.urls=['127.0.0.1:8000']"],
            "retrieval.urls holds '127.0.0.1:8000', which is no http:// or https:// address",
        ),
        *(
            (
                ["retrieval.kind=http", f"retrieval.urls=['{url}']"],
                f"retrieval.urls holds '{url}', which is no http:// or https:// address",
            )
            for url in (
                "http://",
                "http:///p",
                "http://[",
                "http://h:99999",
                "http://h:x",
                "http://a b",
            )
        ),
        (
            ["retrieval.index=hybrid", "retrieval.dense_index=sq88"],
            "retrieval.dense_index=sq88: there is no dense index called 'sq88'; did you mean 'sq8'? "
            "(`searchrl index kinds` lists all; a FAISS description starts with a capital letter)",
        ),
        (
            ["retrieval.index=dense", "retrieval.dense_index=sq8+fp8"],
            "retrieval.dense_index=sq8+fp8: sq8+fp8: 'fp8' is no store; choose one of flat, fp16, sq8",
        ),
        (
            ["retrieval.index_path=nowhere"],
            "retrieval.index_path=nowhere holds no index (no manifest.json); make one with `searchrl index "
            "build`, or leave it empty to have one built under assets",
        ),
        (
            ["retrieval.devices=[gpu]"],
            "retrieval.devices: devices [gpu] are neither the CPU alone nor GPUs alone: write cpu, or "
            "cuda:0, cuda:1",
        ),
        (
            ["retrieval.kind=google"],
            "retrieval.kind=google needs a key in the environment variable SERPER_API_KEY",
        ),
        (
            ["retrieval.kind=brave"],
            "retrieval.kind=brave needs a key in the environment variable BRAVE_API_KEY",
        ),
        (
            ["retrieval.kind=searxng"],
            "retrieval.web.url='' is no http:// or https:// address, which retrieval.kind=searxng needs; for "
            "example http://127.0.0.1:8080",
        ),
        (
            ["retrieval.kind=mcp", "retrieval.web.url=http://h/mcp", "retrieval.web.tool=''"],
            "retrieval.web.tool is not set; name the search tool of the MCP server",
        ),
        (
            ["retrieval.kind=custom"],
            "retrieval.kind=custom needs retrieval.import_path, of the form module:Class",
        ),
        (
            ["retrieval.kind=custom", "retrieval.import_path=json:dumps"],
            "retrieval.import_path=json:dumps cannot be called with 0 arguments and retrieval.kwargs={}: "
            "missing a required argument: 'obj'",
        ),
        (
            ["retrieval.kind=custom", "retrieval.import_path=json:JSONDecoder"],
            "retrieval.import_path=json:JSONDecoder needs a method `async def search(self, query, top_k)`",
        ),
        (
            ["retrieval.import_path=json:JSONDecoder"],
            "retrieval.import_path and retrieval.kwargs are only used with retrieval.kind=custom, not "
            "embedded; choose retrieval=custom, or leave them out",
        ),
        (
            ["retrieval.kwargs.digits=3"],
            "retrieval.import_path and retrieval.kwargs are only used with retrieval.kind=custom, not "
            "embedded; choose retrieval=custom, or leave them out",
        ),
        (
            ["retrieval.kind=mcp", "retrieval.web.url=http://h/mcp", "retrieval.web.proxy=h:1"],
            "retrieval.web.proxy='h:1' is no http:// or https:// address",
        ),
        (
            ["retrieval.kind=mcp", "retrieval.web.url=http://h/mcp", "retrieval.web.requests_per_second=0"],
            "retrieval.web.requests_per_second=0 must be above 0",
        ),
        (
            ["retrieval.kind=mcp", "retrieval.web.url=http://h/mcp", "retrieval.web.max_requests=-1"],
            "retrieval.web.max_requests=-1 must not be negative",
        ),
        (
            ["retrieval.kind=replay"],
            "retrieval.cache is not set; name the recording that retrieval=replay answers from",
        ),
        (
            ["retrieval.kind=replay", "retrieval.cache=no.sqlite"],
            "retrieval.cache=no.sqlite does not exist; record one by running the same with another retrieval "
            "and retrieval.cache=FILE",
        ),
        (
            ["retrieval.kind=none", "retrieval.cache=a.sqlite"],
            "retrieval.cache=a.sqlite has nothing to record with retrieval=none; leave it empty",
        ),
        (
            ["retrieval.kind=oracle"],
            "retrieval.kind=oracle returns the gold passages whatever is asked, so a policy would learn that "
            "queries do not matter; use it with `searchrl eval`, or choose retrieval=bm25",
        ),
        (
            ["retrieval.kind=none", "retrieval.shuffle_documents=true"],
            "retrieval.shuffle_documents=true shuffles the embedded corpus, which retrieval.kind=none does "
            "not have; choose retrieval=shuffled, or set it to false",
        ),
        (
            ["stall_timeout_s=1320"],
            "stall_timeout_s=1320 would take a rollout for hanging that only waits: it may be silent for "
            "episode.deadline_s=600 + retrieval.patience_s=600 + retrieval.deadline_s=120; raise it above "
            "1320, or lower these",
        ),
        (["seed=-1"], "seed=-1 must not be negative"),
        (["logger.trajectories_every=-1"], "logger.trajectories_every=-1 must not be negative"),
        (
            ["logger.wandb=online"],
            "logger.wandb=online needs a key, from the environment variable WANDB_API_KEY or `wandb login`; "
            "without one, logger=wandb_offline writes what `wandb sync` uploads later",
        ),
        (
            ["resume=maybe"],
            "resume=maybe says nothing; choose false, true (there must be a checkpoint) or auto",
        ),
        (
            ["resume=auto", "resume_changes=[optimizer.rl]"],
            "resume_changes=optimizer.rl is nothing that a resumed run must keep; did you mean "
            "'optimizer.lr'?",
        ),
        (
            ["resume=auto", "resume_changes=[watch.window]"],
            "resume_changes=watch.window is nothing that a resumed run must keep; it may change anyway, or "
            "does not exist",
        ),
        (
            ["saving.keep_best=true", "saving.every=10", "eval.every=4"],
            "saving.keep_best needs an evaluation with every checkpoint, but saving.every=10 is no multiple "
            "of eval.every=4; set both, for example to 50 and 25",
        ),
        (
            ["saving.keep_best=true", "eval.every=4"],
            "saving.keep_best needs an evaluation with every checkpoint, but saving.every=0 is no multiple "
            "of eval.every=4; set both, for example to 50 and 25",
        ),
        (["optimizer.lr=0"], "optimizer.lr=0 must be above 0"),
        (["optimizer.lr=-1e-6"], "optimizer.lr=-1e-06 must be above 0"),
        (["optimizer.lr=nan"], "optimizer.lr=nan must be a finite number"),
        (["importance.rejection.lo=-inf"], "importance.rejection.lo=-inf must be a finite number"),
        (["optimizer.betas=[0.9,inf]"], "optimizer.betas=inf must be a finite number"),
        (["data.train_hops=[1,[2]]"], "data.train_hops holds [2]; write a list of plain values"),
        (["watch.ignore=[{a: 1}]"], "watch.ignore holds {'a': 1}; write a list of plain values"),
        (["reward.judge.timeout_s=inf"], "reward.judge.timeout_s=inf must be a finite number"),
        (["seed=4294967296"], "seed=4294967296 must be below 2^32"),
        (["data.train_hops=[-5000000000]"], "data.train_hops=-5000000000 must be below 2^32"),
        (["seed=-1", "watch.likelihood_fall=nan"], "watch.likelihood_fall=nan must be a finite number"),
        (
            ["name=' '"],
            "name is not set; give it, or start from an experiment, for example +experiment=quickstart",
        ),
        (
            ["run_dir=''"],
            "run_dir is not set; give it, or start from an experiment, for example +experiment=quickstart",
        ),
        (
            ["optimizer.betas=[0.9]"],
            "optimizer.betas=[0.9] must be two numbers, each at least 0 and below 1",
        ),
        (
            ["optimizer.betas=[0.9,1.0]"],
            "optimizer.betas=[0.9, 1.0] must be two numbers, each at least 0 and below 1",
        ),
        (
            ["optimizer.warmup_steps=2"],
            "optimizer.warmup_steps=2 never ends within steps=2; lower it",
        ),
        (["deepspeed.zero_stage=5"], "deepspeed.zero_stage=5 is no ZeRO stage; choose 0, 1, 2 or 3"),
        (
            ["deepspeed.zero_stage=0", "model.dtype=bfloat16"],
            "deepspeed.zero_stage=0 with model.dtype=bfloat16 would train without fp32 master weights; "
            "choose stage 1, 2 or 3, or model.dtype=float32",
        ),
        (
            ["episode.prompt_template=Answer {quesiton}"],
            "episode.prompt_template does not contain {question}; the policy would never see the question",
        ),
        (["warmstart.two_hop_fraction=1.5"], "warmstart.two_hop_fraction=1.5 must lie between 0 and 1"),
        (
            ["reward.kind=em_plus_format", "warmstart.demonstrations=8", "warmstart.thoughts=false"],
            "reward.kind=em_plus_format rewards thinking before acting, which demonstrations with "
            "warmstart.thoughts=false never show; choose warmstart.thoughts=true, or reward=em",
        ),
        (["watch.min_ess_ratio=1.1"], "watch.min_ess_ratio=1.1 must lie between 0 and 1"),
        (
            ["watch.ignore=[searches,length]"],
            "watch.ignore=length is no rule; choose among likelihood, entropy, mismatch, gradient, "
            "ratio, drift, repetition, thinking, unanswered, searches",
        ),
        (
            ["retrieval.max_failed_fraction=-0.1"],
            "retrieval.max_failed_fraction=-0.1 must lie between 0 and 1",
        ),
        (
            ["data.train=no.jsonl"],
            "data.train=no.jsonl does not exist; `searchrl data worldfacts` builds the quickstart's data, "
            "`searchrl data prepare` the published sets",
        ),
        (
            ["model.path=''"],
            "model.path is not set; give it, or start from an experiment, for example +experiment=quickstart",
        ),
    ],
)
def test_one_problem_gives_one_line(
    overrides: list[str], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SERPER_API_KEY", raising=False)
    monkeypatch.delenv("BRAVE_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", "/nowhere")  # no .netrc
    changed = OmegaConf.merge(OmegaConf.structured(valid()), OmegaConf.from_dotlist(overrides))
    cfg = OmegaConf.to_object(changed)
    assert isinstance(cfg, Config)
    assert_refused(cfg, problem)


def test_a_token_that_no_header_takes_is_refused_without_being_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEARCHRL_RETRIEVAL_TOKEN", "two words")
    assert problems("+experiment=smoke", "retrieval=http", "retrieval.urls=[http://127.0.0.1:8000]") == (
        f"{HEAD}  - the environment variable SEARCHRL_RETRIEVAL_TOKEN must be printable ASCII without spaces"
    )


def test_what_validation_finds_reaches_the_user() -> None:
    assert problems("+experiment=smoke", "retrieval=http", "retrieval.corpus=x") == (
        f"{HEAD}  - retrieval.urls is empty; name at least one server, for example [http://127.0.0.1:8000]"
    )


def test_a_run_without_an_experiment_is_told_all_that_is_missing() -> None:
    advice = "is not set; give it, or start from an experiment, for example +experiment=quickstart"
    assert problems() == HEAD + "\n".join(
        [
            *(f"  - {name} {advice}" for name in ("model.path", "data.train", "data.eval")),
            "  - retrieval.corpus is not set; name a corpus (JSONL), or choose retrieval=none or http",
        ]
    )


def test_all_problems_are_reported_at_once() -> None:
    bad = ["seed=-1", "optimizer.lr=0", "group_size=1", "sampling.top_p=0.9", "steps=0", "data.eval=no"]
    lines = problems("+experiment=smoke", *bad).splitlines()
    assert lines[0] + "\n" == HEAD
    keys = ("data.eval", "steps", "optimizer.lr", "seed", "sampling.top_p", "group_size", "optimizer.warmup")
    assert len(lines) == len(keys) + 1
    assert all(line.startswith(f"  - {key}") for line, key in zip(lines[1:], keys, strict=True))


@pytest.mark.parametrize(
    "name",
    [
        "groups_per_step",
        "engine.tensor_parallel",
        "engine.max_num_seqs",
        "engine.block_size",
        "engine.max_num_batched_tokens",
        "episode.max_turn_tokens",
        "episode.max_query_chars",
        "episode.max_consecutive_invalid",
        "episode.top_k",
        "eval.samples",
        "retrieval.max_concurrency",
        "batching.max_tokens",
        "batching.logprob_chunk",
        "sync.probe_sequences",
        "sync.probe_tokens",
        "saving.keep",
        "warmstart.epochs",
        "warmstart.batch_size",
        "watch.window",
    ],
)
def test_counts_are_at_least_one(name: str) -> None:
    cfg = valid()
    put(cfg, name, 1)
    validate(cfg)
    put(cfg, name, 0)
    assert_refused(cfg, f"{name}=0 must be at least 1")


@pytest.mark.parametrize(
    "name",
    [
        "optimizer.max_grad_norm",
        "engine.kv_cache_gib",
        "sampling.temperature",
        "retrieval.timeout_s",
        "retrieval.deadline_s",
        "episode.deadline_s",
        "eval.temperature",
        "sync.probe_max_abs_diff",
        "warmstart.lr",
        "watch.likelihood_fall",
    ],
)
def test_amounts_are_above_zero(name: str) -> None:
    cfg = valid()
    put(cfg, name, 0.5)
    validate(cfg)
    put(cfg, name, 0.0)
    assert_refused(cfg, f"{name}=0 must be above 0")


@pytest.mark.parametrize(
    "name",
    [
        "processes",
        "device_memory_gib",
        "optimizer.weight_decay",
        "episode.max_searches",
        "eval.every",
        "eval.questions",
        "eval.interim_questions",
        "saving.every",
        "retrieval.patience_s",
        "warmstart.demonstrations",
    ],
)
def test_switches_may_be_zero_but_not_negative(name: str) -> None:
    cfg = valid()
    put(cfg, name, 0)
    validate(cfg)
    put(cfg, name, -1)
    assert_refused(cfg, f"{name}=-1 must not be negative")


def put(cfg: Config, name: str, value: float) -> None:
    *sections, key = name.split(".")
    target: Any = cfg
    for section in sections:
        target = getattr(target, section)
    setattr(target, key, value)


def assert_refused(cfg: Config, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(cfg)
    assert str(caught.value) == f"{HEAD}  - {problem}"


def test_questions_are_shared_evenly_by_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    validate(valid(), world_size=2)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert problems("+experiment=smoke") == (
        f"{HEAD}  - groups_per_step=4 cannot be shared evenly by 3 engines; use a multiple of 3"
    )


@pytest.mark.parametrize(
    ("size", "ranks", "a_node", "model", "problem"),
    [
        (2, 2, 2, "random:tiny", ""),
        (2, 4, 2, "random:tiny", ""),
        (4, 4, 4, "random:tiny", ""),  # two ranks have a copy of each of two key-value heads
        (4, 16, 8, "org/unknown", ""),
        (2, 3, 3, "random:tiny", "does not divide the number of ranks of the run, 3; start a multiple of 2"),
        (4, 4, 2, "random:tiny", "does not divide the number of ranks of the node, 2; start a multiple of 4"),
        (
            2,
            2,
            2,
            "package:smollm2-135m",
            "cannot share the 9 attention heads and 3 key-value heads of package:smollm2-135m; choose among "
            "1, 3, 9",
        ),
        (8, 8, 8, "random:tiny", "cannot share the 4 attention heads and 2 key-value heads of random:tiny"),
    ],
)
def test_ranks_that_hold_an_engine(size: int, ranks: int, a_node: int, model: str, problem: str) -> None:
    cfg = valid()
    cfg.engine.tensor_parallel, cfg.model.path = size, model
    check = partial(validate, cfg, world_size=ranks, local_world_size=a_node)
    if not problem:
        check()
        return
    for training in (True, False):
        with pytest.raises(ConfigError, match=f"- engine.tensor_parallel={size} {re.escape(problem)}"):
            check(training=training)


def test_engines_share_questions_whatever_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert "groups_per_step=4 cannot be shared evenly by 8 engines" in problems("+experiment=smoke")
    load_config(["+experiment=smoke", "engine.tensor_parallel=2"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    found = problems("+experiment=smoke", "engine.tensor_parallel=2")
    assert found.startswith(
        f"{HEAD}  - engine.tensor_parallel=2 does not divide the number of ranks of the n"
    )


def test_the_context_limit_is_exact() -> None:
    cfg = valid()
    cfg.episode = EpisodeConfig(
        max_searches=2, max_turn_tokens=24, max_observation_tokens=200, max_context_tokens=473
    )
    validate(cfg)


def test_what_is_not_used_is_not_checked() -> None:
    cfg = valid()
    cfg.retrieval = RetrievalConfig(kind=RetrievalKind.none, corpus="no.jsonl", urls=("ftp://x",))
    cfg.model = ModelConfig(path="anything")
    validate(cfg)


# --- the command line -----------------------------------------------------------------------------------


def test_validate_prints_what_the_run_amounts_to(capsys: pytest.CaptureFixture[str]) -> None:
    main(["validate", "+experiment=smoke", "name=mine"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "valid: 2 steps of 4 groups x 4 = 16 trajectories, 32 in all; run directory runs/mine"
    )
    assert lines[-1].startswith("  peak ")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_a_plan_and_fits(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["validate", f"+experiment={name}", f"processes={RANKS.get(name, 1)}"])
    peak = float(capsys.readouterr().out.splitlines()[-1].split()[1])
    assert 0 < peak < FITS.get(name, 80)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_opens_with_its_command(name: str) -> None:
    lines = (CONF / "experiment" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1].startswith("# ")
    assert lines[1].partition(" train ")[2].split()[0] == f"+experiment={name}"


def test_bad_input_is_one_message_and_exit_code_two(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["searchrl", "validate", "+experiment=smoke", "seed=-1"])
    with pytest.raises(SystemExit) as caught:
        run()
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"searchrl: {HEAD}  - seed=-1 must not be negative\n"


def test_the_run_directory_records_the_configuration(workplace: Path) -> None:
    cfg, resolved = load_config(["+experiment=smoke"])
    _claim_run_dir(cfg, resolved)
    recorded = OmegaConf.merge(
        OmegaConf.structured(Config), OmegaConf.load(workplace / "runs/smoke/config.yaml")
    )
    assert OmegaConf.to_object(recorded) == cfg  # everything that a rerun needs


def test_a_run_is_never_written_over(workplace: Path) -> None:
    cfg, resolved = load_config(["+experiment=smoke"])
    _claim_run_dir(cfg, resolved)
    _claim_run_dir(cfg, resolved)  # a run that never logged a step may be started again
    (workplace / "runs/smoke/metrics.jsonl").touch()
    recorded = (workplace / "runs/smoke/config.yaml").read_text(encoding="utf-8")
    other, other_resolved = load_config(["+experiment=smoke", "steps=9"])
    with pytest.raises(ConfigError) as caught:
        _claim_run_dir(other, other_resolved)
    assert str(caught.value) == (
        "runs/smoke holds a run already; continue it with resume=true, or choose another name=..."
    )
    assert (workplace / "runs/smoke/config.yaml").read_text(encoding="utf-8") == recorded
    resumed, resumed_resolved = load_config(["+experiment=smoke", "steps=9", "resume=auto"])
    _claim_run_dir(resumed, resumed_resolved)
    assert "steps: 9" in (workplace / "runs/smoke/config.yaml").read_text(encoding="utf-8")


def test_only_the_first_rank_claims_the_directory(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, resolved = load_config(["+experiment=smoke"])
    monkeypatch.setenv("RANK", "1")
    _claim_run_dir(cfg, resolved)
    assert not (workplace / "runs").exists()


def test_an_evaluation_needs_a_model_and_questions_only() -> None:
    for name in ("train", "corpus"):
        Path(f"assets/worldfacts/{name}.jsonl").unlink()
    given = ["checkpoint=org/model", "data.eval=assets/worldfacts/test.jsonl", "retrieval=none"]
    assert load_config(given, training=False)[0].checkpoint == "org/model"
    trained = problems(*given)
    assert "  - model.path is not set" in trained
    assert "  - data.train is not set" in trained

    warm = ["+experiment=smoke", "retrieval=none"]  # its model is made from training questions
    with pytest.raises(ConfigError, match=r"data\.train=assets/worldfacts/train\.jsonl does not exist"):
        load_config(warm, training=False)
    load_config([*warm, "warmstart.demonstrations=0", "data.train=''"], training=False)


def test_an_oracle_needs_a_corpus_and_records_nothing() -> None:
    cfg = valid()
    cfg.retrieval = RetrievalConfig(kind=RetrievalKind.oracle, corpus="no.jsonl", cache="a.sqlite")
    with pytest.raises(ConfigError) as caught:
        validate(cfg, training=False)
    assert str(caught.value) == (
        f"{HEAD}  - retrieval.cache=a.sqlite has nothing to record with retrieval=oracle; leave it empty\n"
        "  - retrieval.corpus=no.jsonl does not exist; `searchrl data worldfacts` builds the quickstart's"
    )


def test_an_evaluation_runs_on_any_number_of_ranks() -> None:
    validate(valid(), world_size=3, training=False)
    with pytest.raises(ConfigError, match="groups_per_step=4 cannot be shared evenly by 3 engines"):
        validate(valid(), world_size=3)


def test_runs_and_evaluations_do_not_continue_one_another(workplace: Path) -> None:
    cfg, resolved = load_config(["+experiment=smoke", "resume=auto"])
    folder = workplace / "runs" / "smoke"
    (folder / "eval").mkdir(parents=True)
    (folder / "metrics.jsonl").touch()
    with pytest.raises(ConfigError) as caught:
        _claim_run_dir(cfg, resolved, training=False)
    assert str(caught.value) == (
        "runs/smoke holds a training run, which cannot be continued so; choose another name=..."
    )
    _claim_run_dir(cfg, resolved)
    (folder / "metrics.jsonl").rename(folder / "eval" / "settings.json")
    with pytest.raises(ConfigError, match="runs/smoke holds an evaluation, which cannot be continued so"):
        _claim_run_dir(cfg, resolved)
    _claim_run_dir(cfg, resolved, training=False)
    cfg.resume = False
    with pytest.raises(ConfigError, match="runs/smoke holds a run already"):
        _claim_run_dir(cfg, resolved, training=False)
    with pytest.raises(ConfigError, match="runs/smoke holds an evaluation, which cannot be continued so"):
        _claim_run_dir(cfg, resolved)


def test_a_run_that_saved_nothing_cannot_be_resumed_and_leaves_nothing(workplace: Path) -> None:
    cfg, resolved = load_config(["+experiment=smoke", "name=never", "resume=true"])
    with pytest.raises(CheckpointError, match="resume=true finds no checkpoint in runs/never/checkpoints"):
        _claim_run_dir(cfg, resolved)
    assert not (workplace / "runs" / "never").exists()


def test_a_resumed_run_with_other_settings_is_refused_before_anything_is_written(workplace: Path) -> None:
    cfg, resolved = load_config(["+experiment=smoke"])
    _claim_run_dir(cfg, resolved)
    recorded = (workplace / "runs/smoke/config.yaml").read_text(encoding="utf-8")
    checkpoint = workplace / "runs/smoke/checkpoints/step-000002"
    checkpoint.mkdir(parents=True)
    state = {"step": 2, "identity": settings_to_keep(cfg), "world_size": 1}
    (checkpoint / "state.json").write_text(json.dumps(state), encoding="utf-8")
    for resume in ("true", "auto"):
        other, other_resolved = load_config(["+experiment=smoke", "loss=gspo", f"resume={resume}"])
        with pytest.raises(ConfigError) as caught:
            _claim_run_dir(other, other_resolved)
        assert str(caught.value) == (
            "runs/smoke/checkpoints/step-000002 belongs to another run:\n"
            "  - loss.kind: 'clip' there, 'gspo' here\n"
            "  - loss.eps_low: 0.2 there, 0.0003 here\n"
            "  - loss.eps_high: 0.28 there, 0.0004 here\n"
            "  - loss.aggregation: 'token' there, 'sequence' here\n"
            "set them back, choose another name=…, or mean it: "
            "resume_changes=[loss.kind,loss.eps_low,loss.eps_high,loss.aggregation]"
        )
        assert (workplace / "runs/smoke/config.yaml").read_text(encoding="utf-8") == recorded
    same, same_resolved = load_config(["+experiment=smoke", "steps=9", "watch.window=9", "resume=auto"])
    _claim_run_dir(same, same_resolved)


def test_an_evaluation_does_not_write_over_a_run(workplace: Path) -> None:
    (workplace / "runs" / "mine").mkdir(parents=True)
    (workplace / "runs" / "mine" / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match="runs/mine holds a training run, which cannot be continued so"):
        main(["eval", "+experiment=smoke", "name=mine"])
