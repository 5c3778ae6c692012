"""Process-wide settings that must stand before torch, vLLM or DeepSpeed are imported."""

from __future__ import annotations

import logging
import os
import signal
import time
import warnings

QUIET_LOGGERS = (
    "deepspeed",
    "DeepSpeed",
    "transformers",
    "huggingface_hub",
    "vllm",
    "httpx",
    "httpx2",
    "mcp",
    "torch.distributed",
)

QUIET_VARIABLES = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # Bars of transformers, and of vLLM while it captures CUDA graphs and warms kernels up, most of which no
    # setting of its own turns off (read in vllm 0.32's v1/worker/gpu/cudagraph_utils.py and
    # model_executor/warmup; a CPU run has none). tqdm reads it when it is imported.
    "TQDM_DISABLE": "1",
}

LAUNCHER_VARIABLE = "SEARCHRL_LAUNCHER"
"""Set, to a process id, in ranks that `launcher.launch` started."""

# vLLM and DeepSpeed call these by the names that torch is about to drop, some of them at every step.
_DEPRECATED_NAMES = "reduce_op|all_gather_into_tensor|reduce_scatter_tensor"


def prepare_environment(device: str, *, is_tiny: bool = False) -> None:
    """Set thread counts, accelerator, log levels and warnings; what the user has set stays.

    Args:
        device: ``cpu`` or ``cuda``.
        is_tiny: the model's products are so small that a second thread gives nothing, and costs everything
            where something else runs too: each product then waits for that thread's turn.
    """
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # torchrun sets one thread when nothing is set; a rank's fair share of the cores is what we want.
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and LAUNCHER_VARIABLE not in os.environ
    if "OMP_NUM_THREADS" not in os.environ or by_torchrun:
        share = max(1, len(os.sched_getaffinity(0)) // local_ranks)
        os.environ["OMP_NUM_THREADS"] = str(1 if is_tiny else share)
    silence()
    for key, value in default_settings(device).items():
        os.environ.setdefault(key, value)
    warnings.filterwarnings(
        "ignore", rf"`torch\.distributed\.({_DEPRECATED_NAMES})` is deprecated", FutureWarning
    )


def silence() -> None:
    """Keep what libraries say below an error from the terminal: before any of them is imported."""
    for key, value in QUIET_VARIABLES.items():
        os.environ.setdefault(key, value)
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def default_settings(device: str) -> dict[str, str]:
    """Variables of the environment that a run sets, but for those that the user has set."""
    settings = {
        # Threads that spin while they wait cost up to nine tenths of the throughput on shared cores.
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        # The engine lives in this process: weights are handed over, not sent.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        **QUIET_VARIABLES,
    }
    if device == "cpu":
        settings |= {
            "DS_ACCELERATOR": "cpu",
            # Asleep at once, a thread wakes too late for the small products of decoding; so it spins, but for
            # about a millisecond only. Evaluations took 6 and 15 % less (docs/operations).
            "GOMP_SPINCOUNT": "300000",
            # Every rank keeps to its own threads; the engine's pinning would put them all on one core.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            # Eager mode all the same, but without compiling a helper kernel for 15 s first.
            "TORCHDYNAMO_DISABLE": "1",
        }
    return settings


def say_stopping(number: int) -> None:
    """Tell, from a signal's handler, what it does. Not by print, which the signal may have interrupted."""
    name = signal.Signals(number).name
    os.write(2, f"{erased_line()}searchrl: {name}: stopping; from now on Ctrl-C leaves at once\n".encode())


def erased_line() -> str:
    """What to print before a message that cuts into a bar: of this process, or of a rank that was killed."""
    return "\r\x1b[K" if os.isatty(2) and os.environ.get("TERM") != "dumb" else ""


def matmul_gflops() -> float:
    """Speed of a fixed fp32 matrix product, 1024³, on the CPU: how busy this machine is right now."""
    import torch

    a = torch.ones(1024, 1024)
    start = time.perf_counter()
    for _ in range(3):
        a @ a
    return 3 * 2 * 1024**3 / (time.perf_counter() - start) / 1e9
