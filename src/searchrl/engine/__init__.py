"""The sampling engine: vLLM in this process, one per rank or group of ranks. The only module that touches it.

Episodes are coroutines that await ``generate``. One driver task steps the engine in a worker thread, so
that searches are answered while others generate; requests are added and aborted only between steps.

An engine that several ranks hold together is led by the first of them: ``team``.

On a GPU that it shares with the trainer it sleeps during updates: it gives up all its memory, and gets its
weights back from the trainer, never from disk.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import os
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from searchrl.config import DType, EngineConfig
from searchrl.distributed import World, seed_everything
from searchrl.engine.requests import (
    EngineError,
    Generation,
    GenerationRequest,
    sampling_params,
    to_generation,
)
from searchrl.engine.team import Orders, Team
from searchrl.phases import Events, no_events
from searchrl.weight_check import differing

if TYPE_CHECKING:
    import torch

__all__ = ["Engine", "EngineError", "Generation", "GenerationRequest", "shutdown_engines"]

T = TypeVar("T")

OnTokens = Callable[[list[int]], None]
"""Hears, in the engine's thread, all that a request has sampled so far, after every step."""

_loaded: list[Engine] = []
"""Kept until shut down: vLLM ends torch.distributed when one is collected, be it in the next run."""


class Engine:
    """This rank's vLLM engine, or its part of one."""

    def __init__(
        self,
        model: Path | str,
        config: EngineConfig,
        *,
        dtype: DType,
        max_context_tokens: int,
        seed: int,
        world: World,
        events: Events = no_events,
    ) -> None:
        """Load the model. torch.distributed must be initialised; global seeds are restored afterwards.

        Args:
            model: local folder or hub name.
            config: engine settings.
            dtype: number format of weights and activations.
            max_context_tokens: longest stream.
            seed: global seed to restore.
            world: this rank, and how many hold an engine together.
            events: hears of sleep, waking and new weights.
        """
        self._team = Team(world)
        self._sleeps = config.sleep and world.device != "cpu"  # vLLM's CPU build cannot
        shared = _name_shared_memory() if world.device == "cpu" else []
        self._llm = _load(
            model=str(model),
            dtype=str(dtype),
            tensor_parallel_size=world.engine_size,
            enforce_eager=config.enforce_eager or world.device == "cpu",
            max_model_len=max_context_tokens,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=max(config.max_num_batched_tokens, max_context_tokens),
            # After a part of a prompt vLLM winds the request's generator back, which a CPU's cannot do.
            enable_chunked_prefill=world.device != "cpu",
            kv_cache_memory_bytes=int(config.kv_cache_gib * 2**30),
            **_share(world.device),
            block_size=config.block_size,
            enable_sleep_mode=self._sleeps,
            seed=seed,
        )
        for path in shared:  # all ranks have it by now, and keep it: so nothing is left of a killed run
            path.unlink(missing_ok=True)
        seed_everything(seed)
        self._engine = self._llm.llm_engine
        self._thread = ThreadPoolExecutor(1, "engine", initializer=_enter_device, initargs=(world,))
        self._ids = itertools.count()
        self._inbox: list[tuple[str, GenerationRequest]] = []
        self._cancelled: list[str] = []
        self._futures: dict[str, asyncio.Future[Generation]] = {}
        self._listeners: dict[str, OnTokens] = {}
        self._driver: asyncio.Task[None] | None = None
        self._is_running = False
        self._has_failed = False
        self._events = events
        self._asleep: set[str] = set()
        self.policy_version = 0
        """Version of the weights, stamped on every turn."""
        _loaded.append(self)

    def run(self, runner: asyncio.Runner, work: Coroutine[Any, Any, list[T]]) -> list[T]:
        """Run what awaits ``generate`` to its end; the engine is at rest afterwards. A collective.

        The first of the ranks that hold the engine runs ``work`` and returns what it returns. The others
        drop theirs, follow with their parts of the engine, and return nothing.

        Raises:
            EngineError: the engine failed; or, on the ranks that follow, ``work`` failed on the first.
        """
        self._has_failed, self._team.finished = False, []
        if self._team.leads:
            return runner.run(self._lead(work))
        work.close()
        while not (orders := self._team.agree(None)).is_last:
            self._step(orders)
        if orders.error is not None:
            raise EngineError(f"the rank that leads this engine failed: {orders.error}")
        return []

    async def _lead(self, work: Coroutine[Any, Any, list[T]]) -> list[T]:
        error: BaseException | None = None
        self._is_running = True
        try:
            return await work
        except BaseException as raised:
            error = raised
            raise
        finally:
            await self._drain()
            self._is_running = False
            # Where the engine itself failed, followers may be stuck inside a step and would never answer;
            # they end with this process, or by the same error.
            if not self._has_failed:
                self._team.agree(Orders(is_last=True, error=None if error is None else repr(error)))

    async def generate(self, request: GenerationRequest, on_tokens: OnTokens | None = None) -> Generation:
        """Sample one continuation. Any number may be awaited at the same time.

        Args:
            request: what to continue, and how.
            on_tokens: listens to the tokens as they come; for people who watch.

        Raises:
            EngineError: the engine refuses this request, or sleeps, or it failed; then all who wait get the
                error. Or it is called outside of ``run`` where several ranks must take part.
        """
        if self._asleep:
            raise EngineError(f"the engine sleeps ({', '.join(sorted(self._asleep))}): sync weights first")
        if not (self._is_running or self._team.is_alone):
            raise EngineError("several ranks hold this engine: generate only in what Engine.run runs")
        request_id = str(next(self._ids))
        future: asyncio.Future[Generation] = asyncio.get_running_loop().create_future()
        self._futures[request_id] = future
        if on_tokens is not None:
            self._listeners[request_id] = on_tokens
        self._inbox.append((request_id, request))
        if self._driver is None or self._driver.done():
            self._driver = asyncio.create_task(self._drive())
        try:
            return await future
        except asyncio.CancelledError:
            if self._futures.pop(request_id, None) is not None:
                self._cancelled.append(request_id)
            raise
        finally:
            self._listeners.pop(request_id, None)

    async def _drain(self) -> None:
        """Wait until the engine is at rest: it drops cancelled requests only at its next step."""
        while self._driver is not None and not self._driver.done():
            await asyncio.wait([self._driver])

    async def _drive(self) -> None:
        """Step the engine until nobody waits. An error of the engine reaches everybody who waits."""
        loop = asyncio.get_running_loop()
        try:
            while self._futures or self._cancelled:
                inbox, self._inbox = self._inbox, []
                cancelled, self._cancelled = self._cancelled, []
                orders = Orders(add=inbox, abort=cancelled)
                outputs = await loop.run_in_executor(self._thread, self._lead_step, orders)
                for request_id, outcome in outputs:
                    future = self._futures.pop(request_id, None)
                    if future is None or future.done():
                        continue
                    if isinstance(outcome, Generation):
                        future.set_result(outcome)
                    else:
                        future.set_exception(outcome)
        except BaseException as error:
            self._has_failed = True
            waiting, self._futures, self._inbox = self._futures, {}, []
            self._cancelled += waiting  # the engine drops what it still holds of them before its next step
            for future in waiting.values():
                if not future.done():
                    future.set_exception(EngineError(f"the engine failed: {error!r}"))
            if not waiting or not isinstance(error, Exception):  # else everybody concerned knows
                raise

    def _lead_step(self, orders: Orders) -> list[tuple[str, Generation | EngineError]]:
        return self._step(self._team.agree(orders))

    def _step(self, orders: Orders) -> list[tuple[str, Generation | EngineError]]:
        """Abort, add, and one step of the engine: the same on all its ranks."""
        if orders.abort:
            self._engine.abort_request(list(orders.abort))
        outcomes: list[tuple[str, Generation | EngineError]] = []
        for request_id, request in orders.add:
            if request_id not in orders.abort:
                prompt = {"prompt_token_ids": request.prompt_ids}
                try:
                    streams = request_id in self._listeners
                    self._engine.add_request(request_id, prompt, sampling_params(request, streams=streams))
                except Exception as error:  # refused, which concerns nobody else
                    outcomes.append((request_id, EngineError(f"the engine refuses the request: {error}")))
        if self._engine.has_unfinished_requests():
            for output in self._engine.step():
                if (listener := self._listeners.get(output.request_id)) is not None:
                    listener([int(i) for i in output.outputs[0].token_ids])
                if output.finished:
                    outcomes.append((output.request_id, to_generation(output.outputs[0])))
        self._team.finished = [
            (request_id, outcome.token_ids if isinstance(outcome, Generation) else [])
            for request_id, outcome in outcomes
        ]
        return outcomes

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], *, policy_version: int) -> None:
        """Replace all weights by a checkpoint's (name, tensor) pairs and forget every cached prefix."""
        if self._engine.has_unfinished_requests():
            raise EngineError("weights cannot be replaced while requests run")
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        self._llm.apply_model(_refresh_tied_head)
        self._events("weights_loaded", version=policy_version)
        self.reset_prefix_cache()
        self._events("prefix_cache_reset")
        self.policy_version = policy_version

    def differing(self, weights: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
        """Names of a checkpoint's tensors that the loaded model does not hold bit by bit; stale copies too.

        Whole matrices of dense models, in the number format of the checkpoint, can be compared; weights that
        vLLM rearranges for quantised or mixture-of-experts kernels on a GPU cannot.
        """

        def check(model: Any) -> list[str]:
            return differing(model, weights, loader_of=_loader, as_loaded=_as_loaded)

        return list(self.apply_to_model(check))

    @property
    def is_asleep(self) -> bool:
        """True from ``sleep`` until everything has been woken."""
        return bool(self._asleep)

    def sleep(self) -> None:
        """Give weights and key-value cache back to the device, contents and all, until they are woken.

        Raises:
            EngineError: requests run, which vLLM would abort.
        """
        if self._engine.has_unfinished_requests():
            raise EngineError("the engine cannot sleep while requests run")
        moves = self._sleeps and not self._asleep
        if moves:
            self._llm.sleep(level=2)  # 1 would keep the weights on the host, where nobody needs them
            self._asleep = {"weights", "kv_cache"}
        self._events("engine_sleep", level=2, noop=not moves)

    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        """Take the memory of one part again. Weights are undefined then, until they are loaded."""
        moves = part in self._asleep
        if moves:
            self._llm.wake_up([part])
            self._asleep.remove(part)
        self._events("engine_wake", part=part, noop=not moves)

    def reset_prefix_cache(self) -> None:
        """Forget cached keys and values, which belong to the weights that computed them."""
        if not self._engine.reset_prefix_cache():
            raise EngineError("the prefix cache could not be reset: requests are still running")

    def apply_to_model(self, function: Any) -> Any:
        """Call ``function(model)`` on the loaded module; for tests that damage weights on purpose."""
        return self._llm.apply_model(function)[0]

    def shutdown(self) -> None:
        """Stop, and free the memory. Destroys the default process group too: a rank does it last."""
        _loaded.remove(self)
        self._thread.shutdown()
        self._engine.engine_core.shutdown()


def _share(device: str) -> dict[str, float]:
    """How much of a GPU vLLM may count on: next to nothing.

    The cache's size is given and the plan was checked, but vLLM still refuses to start on a GPU of which less
    than this share (0.92) is free, whoever holds the rest: the trainer, or another process.
    """
    return {} if device == "cpu" else {"gpu_memory_utilization": 0.01}


def shutdown_engines() -> None:
    """Stop the engines that are still loaded in this process, which goes on without them."""
    for engine in list(_loaded):
        engine.shutdown()


def _load(**settings: Any) -> Any:
    """VLLM's engine with what never varies: one process a rank, and the log-probabilities really sampled."""
    from vllm import LLM

    local_world_size = os.environ.get("LOCAL_WORLD_SIZE")
    try:
        llm = LLM(
            distributed_executor_backend="external_launcher",
            enable_prefix_caching=True,
            logprobs_mode="processed_logprobs",
            use_tqdm_on_load=False,
            disable_log_stats=True,
            load_format="safetensors",  # never a pickle, which could run code
            trust_remote_code=False,
            **settings,
        )
    except ValueError as error:  # so vLLM refuses settings, and models that it does not know
        raise EngineError(f"vLLM refuses {settings['model']} with these settings: {error}") from error
    if local_world_size is not None:  # external_launcher overwrites it with the tensor-parallel size
        os.environ["LOCAL_WORLD_SIZE"] = local_world_size
    return llm


def _enter_device(world: World) -> None:
    """In a new thread: every thread of CUDA begins on the first device."""
    import torch

    if world.device != "cpu":
        torch.cuda.set_device(world.local_rank)


def _name_shared_memory() -> list[Path]:
    """Let the CPU ranks of an engine meet in shared memory that has a name of this run's own.

    vLLM names it by the ranks alone: two runs on a machine would meet there, and what a killed run left
    behind would keep the next from starting.

    Returns:
        A list that will hold the files of this rank.
    """
    from vllm.distributed.device_communicators import cpu_communicator

    made: list[Path] = []

    def name(communicator: Any) -> str:
        ranks = "-".join(map(str, communicator.ranks))
        group = f"searchrl-{os.environ['MASTER_PORT']}-{communicator.unique_name}-{ranks}"
        made.append(Path("/dev/shm") / f"{group}_{communicator.rank}")
        return group

    cpu_communicator._CPUSHMDistributed.make_group_name = staticmethod(name)
    return made


def _refresh_tied_head(model: Any) -> None:
    """Repack a tied head: the CPU build's prepacked copy goes stale when the embedding is reloaded."""
    head = getattr(model, "lm_head", None)
    embedding = getattr(getattr(model, "model", None), "embed_tokens", None)
    if head is not None and embedding is not None and head.weight is embedding.weight:
        head.quant_method.process_weights_after_loading(head)


def _loader(parameter: Any) -> Any:
    """What vLLM loads the parameter with, without the wrappers that its reloading leaves behind."""
    from vllm.model_executor.model_loader.weight_utils import default_weight_loader

    if not hasattr(parameter, "weight_loader"):
        return default_weight_loader
    return inspect.unwrap(parameter.weight_loader)


def _as_loaded(layer: Any) -> Any:
    """A weight of the form that vLLM remembers for reloading, not filled in."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor
    from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs

    parameters, _ = get_layerwise_info(layer).restore_metadata
    return materialize_meta_tensor(restore_layer_refs(parameters["weight"], layer))
