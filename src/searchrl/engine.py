"""The sampling engine: one in-process vLLM engine per rank. The only module that touches vLLM.

Episodes are coroutines that await ``generate``. One driver task steps the engine in a worker thread, so
that searches are answered while others generate; requests are added and aborted only between steps.

On a GPU that it shares with the trainer it sleeps during updates: it gives up all its memory, and gets its
weights back from the trainer, never from disk.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from searchrl.config import DType, EngineConfig
from searchrl.distributed import World, seed_everything
from searchrl.errors import SearchrlError
from searchrl.phases import Events, no_events
from searchrl.protocol import STOP_STRINGS
from searchrl.trajectory import Finish
from searchrl.weight_check import differing

if TYPE_CHECKING:
    import torch


class EngineError(SearchrlError, RuntimeError):
    """The engine cannot do what was asked; the message says why."""


@dataclass(kw_only=True, slots=True, frozen=True)
class GenerationRequest:
    """One generation."""

    prompt_ids: list[int]
    """[P] the whole stream so far."""
    max_tokens: int
    temperature: float
    """0: greedy."""
    top_p: float
    top_k: int
    seed: int
    stop: tuple[str, ...] = STOP_STRINGS
    """Strings that end the generation; they stay in the ids."""
    ignore_eos: bool = False


@dataclass(kw_only=True, slots=True, frozen=True)
class Generation:
    """What the engine sampled."""

    token_ids: list[int]
    """[S] verbatim, the stop token included."""
    logprobs: list[float]
    """[S] under the distribution really sampled from."""
    finish: Finish


class Engine:
    """A vLLM engine on this rank's device, tensor-parallel size 1."""

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
            world: this rank.
            events: hears of sleep, waking and new weights.
        """
        from vllm import LLM

        self._sleeps = config.sleep and world.device != "cpu"  # vLLM's CPU build cannot
        local_world_size = os.environ.get("LOCAL_WORLD_SIZE")
        self._llm = LLM(
            model=str(model),
            dtype=str(dtype),
            distributed_executor_backend="external_launcher",
            tensor_parallel_size=1,
            enforce_eager=config.enforce_eager or world.device == "cpu",
            max_model_len=max_context_tokens,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=max(config.max_num_batched_tokens, max_context_tokens),
            # After a part of a prompt vLLM winds the request's generator back, which a CPU's cannot do.
            enable_chunked_prefill=world.device != "cpu",
            kv_cache_memory_bytes=int(config.kv_cache_gib * 2**30),
            block_size=config.block_size,
            enable_prefix_caching=True,
            enable_sleep_mode=self._sleeps,
            logprobs_mode="processed_logprobs",
            seed=seed,
            use_tqdm_on_load=False,
            disable_log_stats=True,
        )
        if local_world_size is not None:  # external_launcher overwrites it with the tensor-parallel size
            os.environ["LOCAL_WORLD_SIZE"] = local_world_size
        seed_everything(seed)
        self._engine = self._llm.llm_engine
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._ids = itertools.count()
        self._inbox: list[tuple[str, GenerationRequest]] = []
        self._cancelled: list[str] = []
        self._futures: dict[str, asyncio.Future[Generation]] = {}
        self._driver: asyncio.Task[None] | None = None
        self._events = events
        self._asleep: set[str] = set()
        self.policy_version = 0
        """Version of the weights, stamped on every turn."""

    async def generate(self, request: GenerationRequest) -> Generation:
        """Sample one continuation. Any number may be awaited at the same time.

        Raises:
            EngineError: the engine refuses this request, or sleeps, or it failed; then all who wait get the
                error.
        """
        if self._asleep:
            raise EngineError(f"the engine sleeps ({', '.join(sorted(self._asleep))}): sync weights first")
        request_id = str(next(self._ids))
        future: asyncio.Future[Generation] = asyncio.get_running_loop().create_future()
        self._futures[request_id] = future
        self._inbox.append((request_id, request))
        if self._driver is None or self._driver.done():
            self._driver = asyncio.create_task(self._drive())
        try:
            return await future
        except asyncio.CancelledError:
            if self._futures.pop(request_id, None) is not None:
                self._cancelled.append(request_id)
            raise

    async def drain(self) -> None:
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
                outputs = await loop.run_in_executor(self._thread, self._step, inbox, cancelled)
                for request_id, outcome in outputs:
                    future = self._futures.pop(request_id, None)
                    if future is None or future.done():
                        continue
                    if isinstance(outcome, Generation):
                        future.set_result(outcome)
                    else:
                        future.set_exception(outcome)
        except BaseException as error:
            waiting, self._futures, self._inbox = self._futures, {}, []
            self._cancelled += waiting  # the engine drops what it still holds of them before its next step
            for future in waiting.values():
                if not future.done():
                    future.set_exception(EngineError(f"the engine failed: {error!r}"))
            if not waiting or not isinstance(error, Exception):  # else everybody concerned knows
                raise

    def _step(
        self, inbox: Sequence[tuple[str, GenerationRequest]], cancelled: Sequence[str]
    ) -> list[tuple[str, Generation | EngineError]]:
        if cancelled:
            self._engine.abort_request(list(cancelled))
        gone = set(cancelled)
        outcomes: list[tuple[str, Generation | EngineError]] = []
        for request_id, request in inbox:
            if request_id not in gone:
                prompt = {"prompt_token_ids": request.prompt_ids}
                try:
                    self._engine.add_request(request_id, prompt, _sampling_params(request))
                except Exception as error:  # refused, which concerns nobody else
                    outcomes.append((request_id, EngineError(f"the engine refuses the request: {error}")))
        if self._engine.has_unfinished_requests():
            finished = [output for output in self._engine.step() if output.finished]
            outcomes += [(output.request_id, _generation(output.outputs[0])) for output in finished]
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
        """Stop. Destroys the default process group as well, so it is the last thing a rank does."""
        self._thread.shutdown()
        self._engine.engine_core.shutdown()


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


def _sampling_params(request: GenerationRequest) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        max_tokens=request.max_tokens,
        seed=request.seed,
        stop=list(request.stop),
        include_stop_str_in_output=True,
        ignore_eos=request.ignore_eos,
        detokenize=bool(request.stop),
        logprobs=0,
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _generation(output: Any) -> Generation:
    if output.finish_reason == "length":
        finish = Finish.LENGTH
    elif output.finish_reason == "stop":
        finish = Finish.STOP if isinstance(output.stop_reason, str) else Finish.EOS
    else:
        raise EngineError(f"a generation ended with finish_reason={output.finish_reason!r}")
    logprobs = [float(value) for value in output.logprobs.logprobs]
    token_ids = [int(i) for i in output.token_ids]
    if len(logprobs) != len(token_ids):
        raise EngineError(f"{len(token_ids)} tokens came with {len(logprobs)} log-probabilities")
    return Generation(token_ids=token_ids, logprobs=logprobs, finish=finish)
