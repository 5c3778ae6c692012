"""What a guard stopped, on disk: enough for `searchrl replay` to run the micro-batch again on one process.

    runs/NAME/dumps/step-000012.rank1/dump.json      trajectories and what was known of them
                                     /config.yaml    the run's configuration
    runs/NAME/dumps/step-000012.model/               the weights that the step began with

The weights are the policy's own of that moment, exported by all ranks together: a checkpoint may be many
steps older, and what is not finite now was finite then. They take what an exported model takes, once a stop.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from searchrl.config import Config
from searchrl.distributed import World
from searchrl.errors import InputError
from searchrl.guards import Evidence, Fault, KnownValues, NonFiniteStepError
from searchrl.trajectory import Finish, Outcome, Provenance, Sample, Trajectory, Turn

_FORMAT = 1


class DumpError(InputError, RuntimeError):
    """A folder holds no dump that can be used; the message names it."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Dump:
    """What was read from one."""

    step: int
    """The step that was not made, counted from 1."""
    cfg: Config
    evidence: Evidence
    model: Path
    """The policy's weights before it."""
    reference: str
    """Folder or hub name of the initial policy, which is the reference of a KL penalty."""


@contextmanager
def dumped(
    run_dir: Path,
    *,
    step: int,
    resolved: Mapping[str, Any],
    world: World,
    reference: Path | str,
    export: Callable[[Path], None],
) -> Iterator[None]:
    """Within, what the guards stop is written down before it is raised again; the message says where.

    Args:
        run_dir: the run's.
        step: being made, counted from 1.
        resolved: the configuration as plain containers.
        world: this rank.
        reference: the initial policy.
        export: writes the policy to a folder; a collective.
    """
    try:
        yield
    except NonFiniteStepError as error:
        folder = run_dir / "dumps"
        paths = [folder / f"step-{step:06d}.rank{rank}" for rank, fault in enumerate(error.faults) if fault]
        model = folder / f"step-{step:06d}.model"
        remark = f"\nIt is written down; to run it again: searchrl replay {paths[0]}"
        try:
            if error.evidence is not None:
                path = folder / f"step-{step:06d}.rank{world.rank}"
                _write(path, error.evidence, step=step, resolved=resolved, model=model, reference=reference)
            export(model)
        except OSError as failure:
            remark = f"\nIt could not be written down: {failure}"
        raise NonFiniteStepError(error.faults, error.evidence, remark=remark) from error


def read_dump(folder: Path) -> Dump:
    """Read what ``dumped`` wrote.

    Raises:
        DumpError: there is none in ``folder``, or one of another version.
    """
    from omegaconf import OmegaConf

    file = folder / "dump.json"
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DumpError(
            f"{folder} holds no dump that can be read ({error}); name a folder runs/NAME/dumps/step-N.rankR"
        ) from error
    if record.get("format") != _FORMAT:
        raise DumpError(f"{file} has format {record.get('format')!r}, this version reads {_FORMAT}")
    cfg = OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(folder / "config.yaml"))
    )
    assert isinstance(cfg, Config)
    return Dump(
        step=record["step"],
        cfg=cfg,
        evidence=Evidence(
            fault=Fault(record["message"], record["trajectories"], record["source"]),
            samples=[_sample(entry) for entry in record["samples"]],
            known=record["known"],
            denominator=record["denominator"],
        ),
        model=folder.resolve().parent / record["model"],
        reference=record["reference"],
    )


def _write(
    folder: Path,
    evidence: Evidence,
    *,
    step: int,
    resolved: Mapping[str, Any],
    model: Path,
    reference: Path | str,
) -> None:
    from omegaconf import OmegaConf

    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(dict(resolved)), folder / "config.yaml")
    known: KnownValues = evidence.known
    record = {
        "format": _FORMAT,
        "step": step,
        "policy_version": step - 1,
        "source": evidence.fault.source,
        "message": evidence.fault.message,
        "trajectories": list(evidence.fault.ids),
        "denominator": evidence.denominator,
        "model": model.name,
        "reference": str(reference),
        "samples": [_record(sample) for sample in evidence.samples],
        "known": known,
    }
    # Python's JSON has NaN and Infinity, which is what this is about.
    (folder / "dump.json").write_text(json.dumps(record) + "\n", encoding="utf-8")


def _record(sample: Sample) -> dict[str, Any]:
    trajectory = sample.trajectory
    return {
        "id": sample.id,
        "advantage": sample.advantage,
        "outcome": trajectory.outcome,
        "answer": trajectory.answer,
        "loss_mask": [int(value) for value in trajectory.loss_mask],
        "prompt_ids": trajectory.prompt_ids,
        "turns": [
            {
                "token_ids": turn.token_ids,
                "logprobs": turn.logprobs,
                "text": turn.text,
                "finish": turn.finish,
                "policy_version": turn.policy_version,
                "observation_ids": turn.observation_ids,
                "observation_provenance": turn.observation_provenance,
                "observation_text": turn.observation_text,
            }
            for turn in trajectory.turns
        ],
    }


def _sample(entry: Mapping[str, Any]) -> Sample:
    turns = [
        Turn(
            **{
                **turn,
                "finish": Finish(turn["finish"]),
                "observation_provenance": Provenance(turn["observation_provenance"]),
            }
        )
        for turn in entry["turns"]
    ]
    trajectory = Trajectory(
        prompt_ids=entry["prompt_ids"],
        turns=turns,
        outcome=Outcome(entry["outcome"]),
        answer=entry["answer"],
    )
    return Sample(trajectory=trajectory, advantage=entry["advantage"], id=entry["id"])
