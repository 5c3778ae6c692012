"""Starts a command once for each GPU of this machine, and ends all its ranks together.

On eight GPUs `searchrl train` checks its configuration, then starts itself eight times through torch's
elastic launcher, which tells the ranks who they are (RANK, MASTER_PORT, …), ends all when one fails, and
passes signals on. Under torchrun, which has done the same already, nothing is launched.

A rank that fails does not print why: it writes that to the file that TORCHELASTIC_ERROR_FILE names, and the
launcher prints the first cause, once. A rank whose launcher dies, by kill -9 too, is killed by the kernel.

A signal asks the ranks to stop, and they have time to save. What comes after a failure must not take long:
torch's launcher ends the ranks that are left by SIGTERM, and half a minute later by SIGKILL.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from searchrl.config import Config, ConfigError, Device
from searchrl.environment import LAUNCHER_VARIABLE, erased_line, say_stopping

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

_PR_SET_PDEATHSIG = 1  # prctl(2)
_NOTICED_LATE_S = 5.0
"""A killed rank leaves no time of death. The errors that it causes elsewhere may look this much older."""
STOP_TIMEOUT_S = 3600
"""How long ranks that were asked to stop may take. Whoever asked is usually less patient, and kills."""


def world_size(cfg: Config) -> int:
    """Ranks of the run: as many as a launcher has started, else as many as `launch` would."""
    if is_rank():
        return int(os.environ.get("WORLD_SIZE", "1"))
    if cfg.processes or cfg.device is Device.cpu:
        return cfg.processes or 1
    return visible_gpus() or 1


def local_ranks(cfg: Config) -> int:
    """Those of them that run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if is_rank() else world_size(cfg)


def is_rank() -> bool:
    """True in a process that torchrun, or `launch`, has started."""
    return "RANK" in os.environ


def require_devices(cfg: Config) -> None:
    """Raise ``ConfigError`` where this machine cannot run the ranks that the configuration asks of it."""
    ranks = local_ranks(cfg)
    if cfg.processes and ranks != cfg.processes:
        raise ConfigError(
            f"processes={cfg.processes}, but the launcher has started {ranks} on this machine; leave out "
            "processes=… under torchrun, which decides"
        )
    gpus = visible_gpus() if cfg.device is Device.cuda else ranks
    if gpus < ranks:
        listed = os.environ.get("CUDA_VISIBLE_DEVICES")
        where = "" if listed is None else f" within CUDA_VISIBLE_DEVICES={listed}"
        raise ConfigError(
            f"device=cuda needs a GPU for every process, {ranks} in all, but the NVIDIA driver shows {gpus}"
            f"{where}; choose device=cpu or fewer processes, or ask `searchrl doctor`"
        )


def require_one_process(cfg: Config, who: str) -> None:
    """Raise ``ConfigError`` where a run would have several ranks; ``who`` works in one process."""
    if (ranks := world_size(cfg)) > 1:
        why = "as torchrun says" if is_rank() else f"processes={cfg.processes}, device={cfg.device}"
        raise ConfigError(
            f"{who} works in one process, but this run would have {ranks} ({why}); set processes=1, or start "
            "`searchrl train` or `searchrl eval` with the same settings, which run on several"
        )


def visible_gpus() -> int:
    """GPUs that the NVIDIA driver shows to this process, within CUDA_VISIBLE_DEVICES; 0 without a driver.

    Asks the driver's management library, which touches no GPU. torch could tell as well, but, imported
    before the number of ranks is known, it would settle the number of threads.
    """
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0
    count = ctypes.c_uint(0)
    if nvml.nvmlInit_v2() != 0 or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return 0
    return count_visible(count.value, os.environ.get("CUDA_VISIBLE_DEVICES"))


def count_visible(installed: int, listed: str | None) -> int:
    """How many of the installed GPUs CUDA_VISIBLE_DEVICES leaves, by CUDA's rules.

    Its list ends before the first entry that is no GPU; of MIG slices a process sees one.
    """
    if listed is None:
        return installed
    count = 0
    for entry in listed.split(","):
        name = entry.strip()
        if name.startswith("MIG-"):
            return 1
        if not name.startswith("GPU-") and not (name.isdigit() and int(name) < installed):
            break
        count += 1
    return count


def launch(arguments: Sequence[str], processes: int) -> None:
    """Run ``python ARGUMENTS…`` in so many processes, one rank each, until all have ended.

    Raises:
        SystemExit: a rank failed: its exit code (1 if it was killed), after its error was printed. Or this
            process got a signal, which the ranks get too: the code of the first rank that had a word to say
            before it ended, else 128 + the signal's number.
    """
    # Imported here: a command that runs in one process, or prints its help, needs no launcher.
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)  # this process only waits; what torch would log, it says itself
    os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
    with tempfile.TemporaryDirectory(prefix="searchrl-") as folder:
        # Sockets of engines that several ranks hold, which nobody would remove after a signal.
        os.environ.setdefault("VLLM_RPC_BASE_PATH", folder)

        def pass_on(number: int, frame: FrameType | None) -> None:
            say_stopping(number)
            for sent in (signal.SIGTERM, signal.SIGUSR1):  # once is enough
                signal.signal(sent, signal.SIG_IGN)
            signal.signal(signal.SIGINT, leave)
            raise SignalException(f"got signal {number}", sigval=signal.Signals(number))

        def leave(number: int, frame: FrameType | None) -> None:
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(128 + number)  # the kernel ends the ranks

        for sent in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(sent, pass_on)
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",  # a free port
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            signals_to_handle="SIGHUP,SIGQUIT",
            shutdown_timeout=STOP_TIMEOUT_S,
        )
        try:
            elastic_launch(config, sys.executable)(*arguments)
        except SignalException as error:
            raise SystemExit(_last_words(Path(folder)) or 128 + error.sigval) from None
        except ChildFailedError as error:
            raise SystemExit(_explain(error)) from None


def join_launcher() -> None:
    """In a rank that `launch` started: end with it, whatever ends it."""
    launcher = os.environ.get(LAUNCHER_VARIABLE)
    if launcher is None or not is_rank():
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):  # it died before that
        os.kill(os.getpid(), signal.SIGKILL)
    # Ctrl-C, passed on by the launcher: Python's own handler would have to wait for a collective to end.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def tell_launcher(message: str, exit_code: int) -> bool:
    """Leave the printing of an error to the launcher. False: no `launch` of ours waits for it."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if LAUNCHER_VARIABLE not in os.environ or not is_rank() or not file:
        return False
    now = time.time()
    told = {"message": message, "timestamp": int(now), "seconds": now, "exit_code": exit_code}
    Path(file).write_text(json.dumps(told), encoding="utf-8")
    return True


def _last_words(folder: Path) -> int:
    """Print what the first rank told that had something to tell; return its exit code, 0 if none had."""
    words = [json.loads(file.read_text(encoding="utf-8")) for file in folder.rglob("error.json")]
    if not words:
        return 0
    first = min(words, key=lambda told: float(told["seconds"]))
    print(erased_line() + first["message"], file=sys.stderr, flush=True)
    return int(first["exit_code"])


def _explain(error: ChildFailedError) -> int:
    """Print the first cause of a failure; return the exit code."""

    def order(failure: ProcessFailure) -> tuple[bool, float]:
        told = failure.error_file_data
        if "seconds" in told:
            return False, float(told["seconds"])
        was_ended = failure.exitcode == -signal.SIGTERM  # by the launcher, because of another
        was_killed = failure.exitcode < 0
        return was_ended, failure.timestamp - (_NOTICED_LATE_S if was_killed else 0.0)

    rank, first = min(error.failures.items(), key=lambda item: order(item[1]))
    code = first.exitcode if first.exitcode > 0 else 1
    if "seconds" in first.error_file_data:
        message, code = str(first.message), int(first.error_file_data["exit_code"])
    elif first.exitcode < 0:
        message = f"searchrl: rank {rank} was killed by {first.signal_name()}; the other ranks were ended"
    else:
        message = f"searchrl: rank {rank} ended with exit code {first.exitcode} and without a word"
    print(erased_line() + message, file=sys.stderr, flush=True)
    return code
