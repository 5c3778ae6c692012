"""Saving and resuming a run: whole checkpoints, checked before they are used, of this run and no other."""

from searchrl.checkpoint.files import CheckpointError
from searchrl.checkpoint.identity import identity_of, model_identity
from searchrl.checkpoint.store import Checkpoints, Progress, Saved, check_settings

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "Progress",
    "Saved",
    "check_settings",
    "identity_of",
    "model_identity",
]
