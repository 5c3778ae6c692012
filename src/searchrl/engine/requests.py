"""What an engine is asked and what it answers, and both in vLLM's words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from searchrl.errors import SearchrlError
from searchrl.protocol import STOP_STRINGS
from searchrl.trajectory import Finish


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


def sampling_params(request: GenerationRequest, *, streams: bool = False) -> Any:
    """The request as ``SamplingParams`` of vLLM; ``streams``: every step says what there is so far."""
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
        output_kind=RequestOutputKind.CUMULATIVE if streams else RequestOutputKind.FINAL_ONLY,
    )


def to_generation(output: Any) -> Generation:
    """A finished ``CompletionOutput`` of vLLM.

    Raises:
        EngineError: it ended otherwise than by a stop or its length.
    """
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
