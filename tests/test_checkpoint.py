"""A checkpoint is there as a whole or not at all, damage is found and named, and other runs are refused."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from searchrl.checkpoint import (
    CheckpointError,
    Checkpoints,
    Progress,
    check_settings,
    identity_of,
    model_identity,
)
from searchrl.checkpoint.files import find_damage, read_manifest
from searchrl.config import Config, ConfigError, OptimizerConfig, SavingConfig, Schedule, settings_to_keep
from searchrl.distributed import World
from searchrl.shards import Piece, read_pieces, write_pieces

WORLD = World(rank=0, size=1, local_rank=0, device="cpu")
PROGRESS = Progress(
    sampler={"cursor": 8, "seed": 0, "fingerprint": "f"},
    token_budget={"configured": 64, "tokens": 32},
    wandb_run="abc",
)
SHARD = "rank0000-0000.safetensors"


def store(folder: Path, *, identity: dict[str, Any] | None = None, **options: Any) -> Checkpoints:
    return Checkpoints(
        folder=folder / "checkpoints",
        saving=SavingConfig(**options),
        world=WORLD,
        identity={"seed": 0} if identity is None else identity,
    )


def weights(step: int) -> list[Piece]:
    return [Piece(name="w", start=0, size=100, tensors={"weight": torch.full((100,), float(step))})]


def save(checkpoints: Checkpoints, *steps: int, exact_match: float | None = None) -> None:
    for step in steps:
        write = partial(write_pieces, weights(step), rank=0, steps=step)
        checkpoints.save(write, replace(PROGRESS, step=step, exact_match=exact_match))


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir())


def test_what_was_saved_is_found(tmp_path: Path) -> None:
    save(store(tmp_path), 2, 4)
    checkpoints = store(tmp_path)
    saved = checkpoints.find(must=True)
    assert saved is not None
    assert saved.progress == replace(PROGRESS, step=4)
    assert (saved.world_size, checkpoints.newest, saved.folder) == (1, 4, checkpoints.path(4))
    pieces = weights(0)
    read_pieces(pieces, saved.folder)
    assert pieces[0].tensors["weight"].eq(4.0).all()
    assert set(read_manifest(saved.folder)) == {SHARD, "state.json"}
    assert names(checkpoints) == ["step-000002", "step-000004"]  # nothing unfinished is left


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-99])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def outdate(path: Path) -> None:
    path.write_text(json.dumps({"format": 0, "files": {}}))


DAMAGE: list[tuple[str, Callable[[Path], None], str]] = [
    (SHARD, truncate, "has 421 of the 520 bytes of rank0000-0000.safetensors"),
    (SHARD, flip, "has other bytes in rank0000-0000.safetensors than were written"),
    (SHARD, Path.unlink, "lacks rank0000-0000.safetensors"),
    ("state.json", flip, "has other bytes in state.json than were written"),
    ("manifest.json", Path.unlink, "has no manifest.json"),
    ("manifest.json", truncate, "has a manifest.json that cannot be read"),
    ("manifest.json", outdate, "has format 0, this version reads 1"),
]


@pytest.mark.parametrize(("name", "damage", "said"), DAMAGE)
def test_a_damaged_checkpoint_is_skipped_named_and_set_aside(
    tmp_path: Path, name: str, damage: Callable[[Path], None], said: str
) -> None:
    checkpoints = store(tmp_path)
    save(checkpoints, 2, 4)
    damage(checkpoints.path(4) / name)
    heard: list[str] = []
    checkpoints.say = heard.append
    saved = checkpoints.find(must=False)
    assert saved is not None
    assert (saved.progress.step, checkpoints.newest) == (2, 2)
    assert heard == [f"resume: skipping the damaged checkpoint {checkpoints.path(4)}, which {said}"]
    assert names(checkpoints) == ["damaged-step-000004", "step-000002"]
    save(checkpoints, 3)
    assert names(checkpoints) == ["damaged-step-000004", "step-000002", "step-000003"]


def test_where_nothing_is_whole_a_run_neither_continues_nor_begins(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    save(checkpoints, 2, 4)
    for step in (2, 4):
        truncate(checkpoints.path(step) / SHARD)
    for _ in range(2):  # the second attempt sees what the first saw
        with pytest.raises(CheckpointError, match=r"none of the checkpoints in .* is whole; delete them"):
            checkpoints.find(must=False)


def test_without_checkpoints_only_auto_begins(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    assert checkpoints.find(must=False) is None
    (checkpoints.folder / ".step-000002.partial").mkdir(parents=True)  # killed while saving
    assert checkpoints.find(must=False) is None
    with pytest.raises(CheckpointError) as caught:
        checkpoints.find(must=True)
    assert str(caught.value) == (
        f"resume=true finds no checkpoint in {checkpoints.folder}; with resume=auto the run would begin"
    )
    save(checkpoints, 2)
    assert names(checkpoints) == ["step-000002"]


@pytest.mark.parametrize("readers", [1, 2, 3])
@pytest.mark.parametrize("name", [SHARD, "state.json"])
def test_readers_that_share_the_work_find_all_damage(tmp_path: Path, readers: int, name: str) -> None:
    checkpoints = store(tmp_path)
    save(checkpoints, 2)
    folder = checkpoints.path(2)
    assert not any(find_damage(folder, part=part, parts=readers) for part in range(readers))
    flip(folder / name)
    found = [find_damage(folder, part=part, parts=readers) for part in range(readers)]
    assert [text for text in found if text] == [f"has other bytes in {name} than were written"]


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writing beyond ``size`` bytes fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_failed_save_leaves_older_checkpoints_and_nothing_else(tmp_path: Path) -> None:
    checkpoints = store(tmp_path, keep=1)
    save(checkpoints, 2)
    for limit in (100, 500):  # the weights do not fit; they do, but the state does not
        with file_size_limit(limit), pytest.raises(CheckpointError) as caught:
            save(checkpoints, 4)
        assert str(caught.value).startswith(
            f"{checkpoints.folder}/.step-000004.partial cannot be saved: rank 0"
        )
        assert "Older checkpoints are whole: make room, then continue with resume=true" in str(caught.value)
        assert names(checkpoints) == ["step-000002"]
    assert store(tmp_path).find(must=True) is not None


@pytest.mark.parametrize(
    ("options", "scores", "kept"),
    [
        ({"keep": 1}, [0.1, 0.9, 0.3], [3]),
        ({"keep": 2}, [0.9, 0.1, 0.3], [2, 3]),
        ({"keep": 1, "keep_best": True}, [0.1, 0.9, 0.3], [2, 3]),
        ({"keep": 2, "keep_best": True}, [0.9, 0.1, 0.3], [1, 2, 3]),
        ({"keep": 1, "keep_best": True}, [0.1, 0.3, 0.9], [3]),
        ({"keep": 1, "keep_best": True}, [0.5, 0.5, 0.3], [2, 3]),
        ({"keep": 1, "keep_best": True}, [0.0, None, None], [1, 3]),
        ({"keep": 1, "keep_best": True}, [None, None, None], [3]),
    ],
)
def test_the_newest_are_kept_and_the_best(
    tmp_path: Path, options: dict[str, Any], scores: list[float | None], kept: list[int]
) -> None:
    for step, score in enumerate(scores, start=1):
        save(store(tmp_path, **options), step, exact_match=score)
    assert names(store(tmp_path)) == [f"step-{step:06d}" for step in kept]


# --- what a checkpoint belongs to -----------------------------------------------------------------------


def a_model(folder: Path, value: float) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    write_pieces(
        [Piece(name="w", start=0, size=10**6, tensors={"weight": torch.full((10**6,), value)})],
        folder,
        rank=0,
        steps=0,
    )
    return folder


def test_a_model_is_known_by_its_content(tmp_path: Path) -> None:
    first = model_identity(a_model(tmp_path / "a", 1.0))
    (tmp_path / "moved").mkdir()
    (tmp_path / "a").rename(tmp_path / "moved" / "a")
    assert model_identity(tmp_path / "moved" / "a") == first
    assert model_identity(a_model(tmp_path / "a", 1.5)) != first
    assert model_identity("org/name") == "org/name"


def identity(folder: Path, cfg: Config, **contents: str) -> dict[str, Any]:
    given = {"model": "org/model", "questions": "f1", "retrieval": "index i1", **contents}
    made = identity_of(cfg, model=given.pop("model"), **given)
    return json.loads(json.dumps(made))  # type: ignore[no-any-return]


CHANGES: list[tuple[dict[str, Any], list[str]]] = [
    ({"optimizer": OptimizerConfig(lr=1e-5)}, ["optimizer.lr: 1e-06 there, 1e-05 here"]),
    ({"seed": 1, "group_size": 4}, ["seed: 0 there, 1 here", "group_size: 8 there, 4 here"]),
    (
        {"steps": 50, "optimizer": OptimizerConfig(schedule=Schedule.linear)},
        ["optimizer.schedule: 'constant' there, 'linear' here", "steps: None there, 50 here"],
    ),
]


@pytest.mark.parametrize(("changes", "lines"), CHANGES)
def test_other_settings_are_refused_key_by_key(
    tmp_path: Path, changes: dict[str, Any], lines: list[str]
) -> None:
    run_dir = str(tmp_path)
    save(store(tmp_path, identity=identity(tmp_path, Config(run_dir=run_dir))), 2)
    cfg = Config(run_dir=run_dir, resume="auto", **changes)
    folder = store(tmp_path).path(2)
    keys = ",".join(line.partition(":")[0] for line in lines)
    expected = (
        f"{folder} belongs to another run:\n"
        + "".join(f"  - {line}\n" for line in lines)
        + f"set them back, choose another name=…, or mean it: resume_changes=[{keys}]"
    )
    with pytest.raises(ConfigError) as early:
        check_settings(cfg)
    with pytest.raises(ConfigError) as late:
        store(tmp_path, identity=identity(tmp_path, cfg)).find(must=False)
    assert str(early.value) == str(late.value) == expected
    cfg.resume_changes = tuple(keys.split(","))
    check_settings(cfg)
    meant = store(tmp_path, identity=identity(tmp_path, cfg))
    meant.changes = cfg.resume_changes
    assert meant.find(must=True) is not None


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"model": "org/other"}, "model: 'org/model' there, 'org/other' here"),
        ({"questions": "f2"}, "questions: 'f1' there, 'f2' here"),
        ({"retrieval": "index i2"}, "retrieval: 'index i1' there, 'index i2' here"),
    ],
)
def test_another_model_data_set_or_index_is_refused(
    tmp_path: Path, content: dict[str, str], line: str
) -> None:
    save(store(tmp_path, identity=identity(tmp_path, Config())), 2)
    other = store(tmp_path, identity=identity(tmp_path, Config(), **content))
    with pytest.raises(ConfigError, match=rf"belongs to another run:\n  - {line}\n"):
        other.find(must=False)


def test_a_damaged_checkpoint_is_not_asked_whose_it_is(tmp_path: Path) -> None:
    cfg = Config(run_dir=str(tmp_path))
    checkpoints = store(tmp_path, identity=identity(tmp_path, cfg))
    save(checkpoints, 2)
    truncate(checkpoints.path(2) / "state.json")
    check_settings(replace(cfg, seed=1))  # `find` will say what is wrong with it


KEPT = {
    *("seed", "groups_per_step", "group_size", "overlap", "model.dtype"),
    *("model.lora.rank", "model.lora.alpha", "model.lora.targets"),
    *("sampling.temperature", "sampling.top_p", "sampling.top_k"),
    *("episode.prompt_template", "episode.max_searches", "episode.max_turn_tokens", "episode.top_k"),
    *("episode.max_context_tokens", "episode.max_observation_tokens", "episode.max_query_chars"),
    "episode.max_consecutive_invalid",
    *("optimizer.lr", "optimizer.betas", "optimizer.weight_decay", "optimizer.warmup_steps"),
    *("optimizer.schedule", "optimizer.max_grad_norm"),
    *("data.train_hops", "data.prompt_column", "retrieval.shuffle_documents"),
    *("reward.kind", "reward.answer_score", "reward.retrieval_bonus", "reward.search_cost"),
    *("reward.invalid_penalty", "reward.judge.model", "reward.judge.prompt_template"),
    *("reward.import_path", "reward.kwargs"),
    *("resampling.max_rounds", "resampling.oversample"),
    *("advantage.kind", "advantage.import_path", "advantage.kwargs"),
    *("filters.zero_variance", "filters.overlong", "filters.void_turns"),
    *("update.epochs", "update.minibatches", "update.old_policy"),
    *("loss.kind", "loss.eps_low", "loss.eps_high", "loss.dual_clip", "loss.aggregation"),
    *("loss.constant_length", "loss.kl_coef", "loss.kl_estimator", "loss.kl_in", "loss.entropy_coef"),
    *("loss.llds_coef", "loss.import_path", "loss.kwargs"),
    *("importance.enabled", "importance.level", "importance.mode", "importance.lo", "importance.hi"),
    *("importance.rejection.level", "importance.rejection.lo", "importance.rejection.hi"),
    *("importance.veto", "importance.normalize", "importance.dropped_in_denominator"),
    *("importance.import_path", "importance.kwargs"),
    *("warmstart.demonstrations", "warmstart.two_hop_fraction", "warmstart.thoughts"),
    *("warmstart.epochs", "warmstart.batch_size", "warmstart.lr"),
}


def test_every_setting_either_may_differ_or_is_compared() -> None:
    """A new field is compared; whether it has to be, ``config.resume`` says."""
    assert set(settings_to_keep(Config())) == KEPT


def test_what_may_differ_exists() -> None:
    from searchrl.config.reference import known_keys
    from searchrl.config.resume import MAY_DIFFER

    assert set(known_keys()) >= MAY_DIFFER


def test_settings_survive_json_and_are_compared_by_value() -> None:
    cfg = Config()
    cfg.reward.kwargs = {"weights": (1, 2), "name": "x"}
    kept = settings_to_keep(cfg)
    assert json.loads(json.dumps(kept)) == kept
    assert settings_to_keep(deepcopy(cfg)) == kept
