"""One small frozen dataclass a stage; `align.parse` fills it from a YAML file plus `--key value`.

Names follow TRL and TrainingArguments where they mean the same. Defaults are the paper's where it gives a value
(reference in the comment); the presets in configs/ override them.
"""

import dataclasses
import math
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from align.errors import UserError
from align.maths.importance import LEVELS
from align.maths.kl import ESTIMATORS

COUNTS = (
    "total_episodes", "rollout_batch_size", "num_mini_batches", "num_ppo_epochs", "per_device_train_batch_size",
    "per_device_rollout_batch_size", "per_device_eval_batch_size", "per_device_batch_size",
    "gradient_accumulation_steps", "microbatch_tokens", "max_length", "max_prompt_length", "max_new_tokens",
    "kl_horizon", "logging_steps", "max_steps", "labelers_per_prompt", "validation_labelers_per_prompt",
    "save_total_limit", "selection_prompts",
)  # fmt: skip
NONE_OR_MORE = (
    "save_steps", "save_iterations", "eval_steps", "eval_iterations", "warmup_steps", "decay_steps",
    "warmup_iterations", "value_warmup_iterations", "transcript_iterations", "num_transcripts", "num_mistakes",
    "num_spread_prompts", "reward_retries",
)  # fmt: skip
RATES = (
    "learning_rate",
    "value_learning_rate",
    "muon_learning_rate",
    "ptx_coef",
    "ptx_examples_per_episode",
    "kl_coef",
    "weight_decay",
)
BOUNDS: dict[str, tuple[float, float]] = {  # of every stage that has the key, where it is given
    **dict.fromkeys(COUNTS, (1, 10**9)),
    **dict.fromkeys(NONE_OR_MORE, (0, 10**9)),
    **dict.fromkeys((*RATES, "max_grad_norm"), (0, math.inf)),
    **dict.fromkeys(("gamma", "lam", "ema_decay"), (0, 1)),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (0, 0.999999)),
    **dict.fromkeys(("cliprange", "cliprange_value", "kl_target"), (1e-6, 1e6)),
    "lora_r": (1, 4096),
    "reward_clip": (1e-6, math.inf),
    "seed": (0, 2**32 - 1),
}
VALUE_FOLDS = 5  # of `value_head_init: fitted`: whole episodes, as the tokens of one share its score
TEMPERATURES = (1e-6, 100.0)  # greedy answers, 0, are all alike and have no log-probability to learn from


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """What every stage has."""

    output_dir: str
    seed: int = 0
    bf16: bool = False  # autocast to bfloat16, master weights stay float32; "auto": where the hardware multiplies in it
    attn_implementation: str | None = None  # null: rows in packs; a name: padded rows and that attention
    on_bad_rows: str = "stop"  # or "drop": count them in the manifest and go on
    overwrite_output_dir: bool = False

    def not_needed(self) -> tuple[str, ...]:
        """Paths that the stage can do without, as it is asked here."""
        return ()

    def inputs(self) -> Iterator[tuple[str, str]]:
        """(key, path or hub id) of everything that the stage reads."""
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, str) and (f.name.endswith(("_file", "_path")) or f.name == "model_name_or_path"):
                yield from ((f.name, path.strip()) for path in value.split(",") if path.strip())

    def _keep_inputs(self) -> None:
        """A folder that is written, and may be emptied first, holds nothing that is read."""
        output = Path(self.output_dir).resolve()
        for key, path in self.inputs():
            if Path(path).exists() and Path(path).resolve().is_relative_to(output):
                raise UserError(f"output_dir: {self.output_dir} holds {key} {path}; choose another folder")

    def __post_init__(self) -> None:
        for key, bounds in BOUNDS.items():
            if getattr(self, key, None) is not None:
                between(key, getattr(self, key), *bounds)
        choose("on_bad_rows", self.on_bad_rows, ("stop", "drop"))
        if not self.output_dir:
            raise UserError("output_dir: empty; name the folder this stage writes, e.g. --output_dir runs/tiny/sft")
        self._keep_inputs()


@dataclasses.dataclass(frozen=True)
class TrainingConfig(StageConfig):
    """What every stage that trains has besides."""

    report_to: str = "none"  # or "wandb" (works offline), "tensorboard"
    resume_from_checkpoint: str | None = None  # "latest" (without one yet: from the start) or a checkpoint folder
    save_total_limit: int = 2  # checkpoints to resume from that are kept; SFT's older epochs keep their weights
    max_grad_norm: float = 1.0  # 0: gradients are not clipped

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("report_to", self.report_to, ("none", "wandb", "tensorboard"))


@dataclasses.dataclass(frozen=True)
class TrainerConfig(TrainingConfig):
    """What the stages that a Trainer drives have besides. PPO logs every iteration."""

    logging_steps: int = 10


@dataclasses.dataclass(frozen=True)
class BaseConfig(TrainerConfig):
    """Stage 0: a small Llama and its tokenizer from text. The embedded stand-in for a pretrained model."""

    train_file: str = ""
    validation_file: str = ""
    vocab_size: int = 1024
    hidden_size: int = 128
    intermediate_size: int = 352
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    max_position_embeddings: int = 256
    per_device_train_batch_size: int = 64  # documents
    max_steps: int = 1500
    learning_rate: float = 2e-3  # of AdamW: embeddings, norms, biases
    muon_learning_rate: float = 4e-3  # of Muon: hidden matrices
    adam_beta2: float = 0.98
    warmup_steps: int = 100
    decay_steps: int = 900  # the last steps, over which the rate falls linearly to 0
    save_steps: int = 0  # a checkpoint to resume from every so many steps; 0: none

    def __post_init__(self) -> None:
        super().__post_init__()
        exact_div(self.hidden_size, self.num_attention_heads, "hidden_size / num_attention_heads")
        if self.max_steps < self.warmup_steps + self.decay_steps:
            rate = f"warmup_steps {self.warmup_steps} + decay_steps {self.decay_steps}"
            raise UserError(f"max_steps: {self.max_steps} is under {rate}: the rate would jump; lower one of these")
        for key in ("num_hidden_layers", "num_attention_heads"):
            if getattr(self, key) < 2:
                raise UserError(f"{key}: {getattr(self, key)}; the starting weights need 2 or more")


@dataclasses.dataclass(frozen=True)
class SFTConfig(TrainerConfig):
    """Stage 1: demonstrations -> policy (paper section 3.5, App. C.1 and C.3)."""

    model_name_or_path: str = ""
    chat_template_path: str | None = None  # a Jinja file for a tokenizer that has none; it is saved with the policy
    train_file: str = ""
    validation_file: str = ""
    pretraining_file: str | None = None
    pretraining_fraction: float = 0.0  # share of the training rows that are pretraining text (C.3: 0.1 for RL init)
    completion_only_loss: bool = True
    all_answers: bool = False  # of a conversation also the assistant's earlier answers, each a row of its own
    max_length: int = 2048  # rows over it are dropped and counted, never cut
    residual_dropout: float = 0.0  # C.1: 0.2 for the SFT baseline
    num_train_epochs: float = 2.0  # C.3: 2 for RL init; C.1: 16 for the SFT baseline
    learning_rate: float = 9.65e-6
    lr_scheduler_type: str = "cosine_with_min_lr"  # to a tenth (C.1, C.3); or cosine, linear, constant
    warmup_steps: float = 0  # under 1: a share of all steps
    weight_decay: float = 0.0  # of matrices, by AdamW and its kin; Muon has none
    optim: str | None = None  # docs/migrating.md lists six; null: muon where it has a rate, else adamw_torch_fused
    muon_learning_rate: float | None = None  # given: hidden matrices by Muon at this rate, the rest by AdamW
    gradient_checkpointing: bool = False  # keep each layer's input alone, compute the layer again in the backward pass
    per_device_train_batch_size: int = 32
    gradient_accumulation_steps: int = 1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    save_steps: int = 0  # besides the checkpoint after each epoch; 0: none
    reward_model_path: str | None = None  # given: choose the epoch by mean reward, else by validation loss
    selection_prompts: int = 256
    max_new_tokens: int = 256
    temperature: float = 1.0  # of the responses whose reward chooses; 0 is greedy
    use_peft: bool = False
    lora_r: int = 16
    lora_alpha: int = 32
    lora_target_modules: tuple[str, ...] = ()  # names of linear layers, e.g. [q_proj, v_proj]; none: all of them

    def __post_init__(self) -> None:
        super().__post_init__()
        choose_optimizer(self.optim, self.muon_learning_rate, self.weight_decay)
        choose("lr_scheduler_type", self.lr_scheduler_type, SCHEDULES)
        between("pretraining_fraction", self.pretraining_fraction, 0, 0.99)
        between("residual_dropout", self.residual_dropout, 0, 0.99)
        between("temperature", self.temperature, 0, 100)
        if self.pretraining_fraction > 0 and not self.pretraining_file:
            raise UserError("pretraining_file: missing; pretraining_fraction > 0 needs text to draw from")
        if self.all_answers and not self.completion_only_loss:
            raise UserError(
                "all_answers: prompts hold earlier answers, and are learned: set completion_only_loss: true"
            )


@dataclasses.dataclass(frozen=True)
class CollectConfig(StageConfig):
    """Policy -> K samples a prompt -> rankings (paper section 3.4, App. C.2)."""

    model_name_or_path: str = ""
    prompts_file: str = ""
    validation_prompts_file: str | None = None
    labelers: str | None = None  # import path of a function that returns labelers; null: write what people should rank
    held_out_labelers: str | None = None  # they rank the validation prompts only
    labelers_per_prompt: int = 1  # paper section 5.3: mostly one
    validation_labelers_per_prompt: int = 2  # two, so that their agreement can be measured
    min_k: int = 4
    max_k: int = 9
    max_prompt_length: int = 1024
    max_new_tokens: int = 256
    temperature: float = 1.0
    per_device_batch_size: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        between("temperature", self.temperature, *TEMPERATURES)
        if not 2 <= self.min_k <= self.max_k:
            raise UserError(f"min_k, max_k: need 2 <= min_k <= max_k, not {self.min_k} and {self.max_k}")


@dataclasses.dataclass(frozen=True)
class RMConfig(TrainerConfig):
    """Stage 2: rankings -> reward model (paper section 3.5, App. C.2)."""

    model_name_or_path: str = ""
    train_file: str = ""
    validation_file: str = ""
    held_out_file: str | None = None  # rankings by labelers who ranked nothing in train_file
    demonstrations_file: str | None = ""  # they score 0 on average once the bias is set; null: no bias
    max_length: int = 2048
    batch_element: str = "ranking"  # or "pair": every pair apart and shuffled, which overfits (paper section 3.5)
    head_init: str = "normal"  # std 1 / sqrt(d + 1) (S App. B.1); "fitted": the best head for the body as it starts
    folds_by: str | None = None  # "labeler" (section 4.1) or "source": cross-validate instead of writing a model
    num_folds: int = 5
    num_train_epochs: float = 1.0  # more overfit fast (C.2); 0: a fitted head alone, the body as it was
    learning_rate: float = 9e-6
    lr_scheduler_type: str = "cosine_with_min_lr"  # to a tenth (C.2); or cosine, linear, constant
    warmup_steps: float = 0  # under 1: a share of all steps
    weight_decay: float = 0.0  # of matrices, by AdamW and its kin; Muon has none
    optim: str | None = None  # docs/migrating.md lists six; null: muon where it has a rate, else adamw_torch_fused
    muon_learning_rate: float | None = None  # given: hidden matrices by Muon at this rate, the rest by AdamW
    gradient_checkpointing: bool = False
    per_device_train_batch_size: int = 64  # batch elements: prompts, each with its K completions
    gradient_accumulation_steps: int = 1
    per_device_eval_batch_size: int = 256  # rankings, each with its K completions; demonstrations
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    eval_steps: int = 0  # held-out loss and accuracy every so many steps and at the last; 0: never
    save_steps: int = 0
    use_peft: bool = False
    lora_r: int = 16
    lora_alpha: int = 32
    lora_target_modules: tuple[str, ...] = ()  # names of linear layers, e.g. [q_proj, v_proj]; none: all of them

    def __post_init__(self) -> None:
        super().__post_init__()
        choose_optimizer(self.optim, self.muon_learning_rate, self.weight_decay)
        choose("lr_scheduler_type", self.lr_scheduler_type, SCHEDULES)
        choose("batch_element", self.batch_element, ("ranking", "pair"))
        choose("head_init", self.head_init, ("normal", "fitted"))
        if self.num_train_epochs <= 0 and (self.num_train_epochs < 0 or self.head_init != "fitted"):
            raise UserError(f"num_train_epochs: {self.num_train_epochs} trains nothing; give more, or fit the head")
        if self.folds_by is not None:
            choose("folds_by", self.folds_by, ("labeler", "source"))
        if self.num_folds < 2:
            raise UserError(f"num_folds: {self.num_folds}; one group is held out at a time, so 2 or more are needed")
        if self.folds_by is not None and self.resume_from_checkpoint not in (None, "latest"):
            raise UserError("resume_from_checkpoint: one checkpoint is of one fold; with folds_by give latest")

    def not_needed(self) -> tuple[str, ...]:
        return ("demonstrations_file",) if self.folds_by else ()


@dataclasses.dataclass(frozen=True)
class ModelTerm:
    """`{model: PATH}` in `reward`: a reward model of any tokenizer, size and architecture."""

    model: str
    weight: float = 1.0
    name: str = ""  # in the metrics; empty: the last part of the path


@dataclasses.dataclass(frozen=True)
class EnsembleTerm:
    """`{models: [PATH, PATH]}` in `reward`: several reward models, one score."""

    models: tuple[str, ...]
    combine: str = "mean"  # or "min", or "mean_minus_std": mean - coef x standard deviation over the models
    coef: float = 1.0
    weight: float = 1.0
    name: str = ""  # empty: ensemble


@dataclasses.dataclass(frozen=True)
class FunctionTerm:
    """`{function: package.module:name}` in `reward`: a Python function."""

    function: str
    weight: float = 1.0
    name: str = ""  # empty: the function's name


RewardTerm = ModelTerm | EnsembleTerm | FunctionTerm


@dataclasses.dataclass(frozen=True)
class PPOConfig(TrainingConfig):
    """Stage 3: prompts, policy and reward -> policy (paper section 3.5, App. C.4)."""

    model_name_or_path: str = ""
    reward: tuple[RewardTerm, ...] = ()  # their weighted sum
    reward_timeout: float | None = 1800.0  # seconds a reward function may take; null: as long as it likes
    reward_retries: int = 2  # a function that raises, hangs or miscounts is called again so many times
    value_model_path: str | None = None  # null: a reward model that reads the policy's tokens, else the policy
    value_head_init: str = "kept"  # or "fitted": to the first rollout's returns, before its update
    train_file: str = ""
    validation_file: str | None = None  # prompts to measure on, that are not trained on
    validation_prompts: int = 256  # so many of them, evenly spaced over the file; 0: all
    eval_iterations: int = 10  # they are answered at the start, every so many iterations and at the end; 0: never
    pretraining_file: str | None = None
    ptx_coef: float = 27.8  # gamma of Eq. 2, on the mean loss of a pretraining token; 0 is plain PPO
    ptx_examples_per_episode: float = 8.0
    ptx_max_length: int = 2048
    total_episodes: int = 256_000
    rollout_batch_size: int = 512  # episodes an iteration, all processes together
    num_mini_batches: int = 8
    num_ppo_epochs: int = 1
    per_device_train_batch_size: int = 16  # microbatch: rows of one forward and backward
    per_device_rollout_batch_size: int = 64  # rows of one forward without gradients, and of one sampling batch
    microbatch_tokens: int | None = None  # a forward holds at most so many tokens, if it has more than one row
    use_vllm: bool = False  # the engine that samples rollouts; vLLM, which you install, draws what our own would
    vllm_gpu_memory_utilization: float = 0.3  # share of a GPU that its weights, keys and values may take
    vllm_enable_sleep_mode: bool = False  # it gives that memory back while the models learn
    old_logprobs: str = "recompute"  # by the training forward, or "sampler": as the sampler's engine computed them
    importance_weight_cap: float | None = None  # given: a token's loss times trainer's / sampler's probability, capped
    importance_weight_band: float | None = None  # given: that weight, and 0 outside [1 / band, band]
    importance_weight_level: str = "token"  # or "sequence": the product over a response weighs each of its tokens
    max_prompt_length: int = 1024  # longer prompts are dropped and counted
    max_new_tokens: int = 1024
    temperature: float = 1.0
    learning_rate: float = 8e-6
    value_learning_rate: float = 9e-6
    warmup_iterations: int = 10  # from 0.1 of peak
    value_warmup_iterations: int = 0  # so many first iterations train the value model alone
    lr_decay: str = "constant"  # or "linear": to 0.1 of peak at the last iteration
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-5
    optim: str = "adamw_torch_fused"  # of policy and value model; others: as in sft
    gradient_checkpointing: bool = False  # of both, too
    use_peft: bool = False  # LoRA on the policy; the reference is the same weights with the adapter off
    value_use_peft: bool = False  # LoRA on the value model; the reward likewise, where both come from one folder
    lora_r: int = 16
    lora_alpha: int = 32
    lora_target_modules: tuple[str, ...] = ()  # names of linear layers, e.g. [q_proj, v_proj]; none: all of them
    frozen_quantization: str | None = None  # "int8": linear layers of models that only score, a byte a weight
    kl_coef: float = 0.02
    kl_estimator: str = "k1"
    kl_target: float | None = None  # given: kl_coef adapts to hold this many nats an episode
    kl_horizon: int = 10_000
    kl_stop: float | None = None  # given: the run ends after an iteration whose KL is over so many nats an episode
    gamma: float = 1.0
    lam: float = 0.95
    cliprange: float = 0.2
    dual_clip: float | None = None  # given, e.g. 3: a token of negative advantage costs at most so many times it
    cliprange_value: float | None = 0.2
    whiten_advantages: bool = True
    whiten_rewards: bool = False
    reward_clip: float | None = None
    missing_eos_penalty: float | None = -1.0  # the score of a response that does not end
    missing_eos_mode: str = "replace"  # or "subtract": score - |penalty|
    finished_target: float | None = None  # given, with "subtract": the penalty adapts so that so many end, e.g. 0.4
    ema_decay: float | None = 0.992  # per optimiser step; the saved policy is the average
    save_iterations: int = 0  # a checkpoint to resume from every so many iterations; 0: none
    transcript_iterations: int = 10
    judge: str | None = None  # import path; its score of each rollout is logged as eval/gold, never trained on

    def inputs(self) -> Iterator[tuple[str, str]]:
        yield from super().inputs()
        for i, term in enumerate(self.reward):
            own = (term.model,) if isinstance(term, ModelTerm) else getattr(term, "models", ())
            yield from ((f"reward[{i}]", path) for path in own)

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("kl_estimator", self.kl_estimator, ESTIMATORS)
        choose("missing_eos_mode", self.missing_eos_mode, ("replace", "subtract"))
        if self.finished_target is not None:
            between("finished_target", self.finished_target, 0.01, 1)
            if self.missing_eos_mode != "subtract" or self.missing_eos_penalty is None:
                remedy = "set missing_eos_mode: subtract and the missing_eos_penalty to start with"
                raise UserError(f"finished_target: adapts a penalty that is subtracted: {remedy}")
        if self.missing_eos_mode == "replace" and (self.missing_eos_penalty or 0) > 0:
            warnings.warn(
                f"missing_eos_penalty: {self.missing_eos_penalty} is the score of an answer that does not end, over "
                "the 0 of demonstrations; TRL's positive penalty is subtracted: missing_eos_mode: subtract",
                stacklevel=2,
            )
        choose("value_head_init", self.value_head_init, ("kept", "fitted"))
        if self.value_head_init == "fitted" and self.rollout_batch_size < VALUE_FOLDS:
            least = f"rollout_batch_size {VALUE_FOLDS} or more"
            raise UserError(f"value_head_init: fitted takes folds of episodes; give {least}")
        between("vllm_gpu_memory_utilization", self.vllm_gpu_memory_utilization, 0.01, 1)
        if self.vllm_enable_sleep_mode and not self.use_vllm:
            raise UserError("vllm_enable_sleep_mode: nothing sleeps without vLLM; set use_vllm: true, or this to false")
        choose("old_logprobs", self.old_logprobs, ("recompute", "sampler"))
        self._check_weights()
        choose("lr_decay", self.lr_decay, ("constant", "linear"))
        between("temperature", self.temperature, *TEMPERATURES)
        choose_optimizer(self.optim)
        choose("frozen_quantization", self.frozen_quantization or "int8", ("int8",))
        if not self.reward:
            raise UserError("reward: missing; give [{model: PATH}], or [{function: package.module:name}]")
        for i, term in enumerate(self.reward):
            check_term(f"reward[{i}]", term, [term_name(other) for other in self.reward[:i]])
        if self.reward_timeout is not None and self.reward_timeout <= 0:
            raise UserError(f"reward_timeout: {self.reward_timeout} seconds; give more than 0, or null for no limit")
        if self.dual_clip is not None and self.dual_clip <= 1 + self.cliprange:
            raise UserError(f"dual_clip: {self.dual_clip} is within 1 + cliprange; give more, e.g. 3, or null for none")
        if self.validation_prompts == 1 or self.validation_prompts < 0:
            raise UserError(
                f"validation_prompts: {self.validation_prompts}; an interval needs 2 or more, 0 is all of them"
            )
        if self.kl_stop is not None and self.kl_stop <= 0:
            raise UserError(f"kl_stop: {self.kl_stop} nats; give more than 0, or null to never stop")
        between("ptx_max_length", self.ptx_max_length, 2, 10**9)  # a document's first token is its query
        if self.value_warmup_iterations * self.rollout_batch_size >= self.total_episodes:
            raise UserError("value_warmup_iterations: leaves none for the policy; lower it, or raise total_episodes")
        if self.ptx_coef > 0 and not self.pretraining_file:
            raise UserError("pretraining_file: missing; ptx_coef > 0 needs text (or set ptx_coef: 0 for plain PPO)")

    @property
    def weighs_tokens(self) -> bool:
        return self.importance_weight_cap is not None or self.importance_weight_band is not None

    def _check_weights(self) -> None:
        choose("importance_weight_level", self.importance_weight_level, LEVELS)
        for key in ("importance_weight_cap", "importance_weight_band"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"{key}: {value} is under 1, the weight where both engines agree; give 1 or more")
            if value is not None and self.old_logprobs == "sampler":
                raise UserError(f"{key}: needs log-probabilities of both; set old_logprobs: recompute, or unset it")
        if self.importance_weight_level == "sequence" and not self.weighs_tokens:
            raise UserError("importance_weight_level: no weights; give importance_weight_cap or importance_weight_band")


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(StageConfig):
    """Checkpoints -> numbers with intervals (paper section 3.6)."""

    preset: str = "custom"
    run_dir: str = ""  # where the stages' timings and rankings are, and where summary.json goes
    base_path: str | None = None
    sft_path: str = ""
    ppo_path: str | None = None
    ppo_ptx_path: str | None = None
    reward_model_path: str | None = ""
    reward_function: str | None = None  # import path of a function of `reward`, in place of a reward model
    judge: str | None = None  # import path, e.g. data.world.judge:judge; null: the reward model compares instead
    prompts_file: str = ""
    few_shot_file: str | None = None
    text_file: str | None = None  # plain text to measure perplexity on
    rankings_file: str | None = None  # held-out rankings: the reward's accuracy; of several labelers their agreement
    num_prompts: int = 0  # evenly spaced over the file; 0: all
    max_new_tokens: int = 256
    temperature: float = 1.0  # of the sampled answers; PPO's own, else another policy than the trained one is measured
    per_device_batch_size: int = 256
    num_transcripts: int = 40
    best_of: int = 0  # SFT answers each prompt so many times more: its best of 2, 4, ... beside PPO; 0: off

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.best_of == 1 or self.best_of < 0:
            raise UserError(f"best_of: {self.best_of} leaves nothing to choose from; give 2 or more, or 0 for none")
        if self.best_of and self.temperature == 0:
            raise UserError("best_of: answers drawn at temperature 0 are all alike; set temperature: 1, or best_of: 0")
        between("temperature", self.temperature, *TEMPERATURES)
        if self.reward_function and self.reward_model_path:
            raise UserError("reward_function: given beside reward_model_path; one scores all answers, drop one of them")
        if self.num_prompts == 1 or self.num_prompts < 0:
            raise UserError(f"num_prompts: {self.num_prompts}; an interval needs 2 or more, 0 is all of them")

    def not_needed(self) -> tuple[str, ...]:
        return ("reward_model_path",) if self.reward_function else ()


@dataclasses.dataclass(frozen=True)
class EvaluateRMConfig(StageConfig):
    """A reward model on held-out rankings, beside its baselines, a peer and the labelers' agreement."""

    reward_model_path: str = ""  # ours, or any sequence classifier with one label
    rankings_file: str = ""  # held out; several labelers a prompt also give their agreement
    held_out_file: str | None = None  # rankings by labelers who ranked nothing in train_file
    train_file: str | None = None  # what the model learned from: sources that are not in it count as held out
    peer_model_path: str | None = None  # a second reward model on the same rankings
    peer_scores_file: str | None = None  # or its scores: {"scores": [K numbers]} a line for each of rankings_file
    labeler_folds_file: str | None = None  # folds.json of `rm` with folds_by: labeler
    source_folds_file: str | None = None  # and with folds_by: source
    ranking_metrics_file: str | None = None  # metrics.jsonl of `rm` with eval_steps, to draw how it overfits
    pair_metrics_file: str | None = None  # the same with batch_element: pair
    max_length: int = 2048  # rankings over it are dropped and counted, never cut
    per_device_batch_size: int = 64  # prompts
    num_mistakes: int = 20
    num_spread_prompts: int = 64  # scored in several batchings, to see whether it moves them

    def inputs(self) -> Iterator[tuple[str, str]]:
        """Nothing to keep apart: the report is written beside the model, and empties nothing."""
        return iter(())

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.peer_model_path and self.peer_scores_file:
            raise UserError("peer_scores_file: given beside peer_model_path; one peer at a time, drop one of the two")


@dataclasses.dataclass(frozen=True)
class EvaluateChoicesConfig(StageConfig):
    """Policies on multiple choice and on pairs of sentences, by their probabilities (paper App. D)."""

    base_path: str | None = None
    sft_path: str = ""
    ppo_path: str | None = None
    ppo_ptx_path: str | None = None
    choices_file: str = ""
    num_rows: int = 0  # of each source, evenly spaced; 0: all
    max_length: int = 2048  # prompt and longest choice; rows over it are left out and counted
    per_device_batch_size: int = 32  # rows, each with its K choices

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_rows == 1 or self.num_rows < 0:
            raise UserError(f"num_rows: {self.num_rows}; an interval needs 2 or more, 0 is all of them")


def choose(key: str, value: str, options: tuple[str, ...]) -> None:
    if value not in options:
        raise UserError(f"{key}: {value!r} is not one of {', '.join(options)}")


# Names are TrainingArguments'; muon is ours (align.optimise), adamw_8bit needs bitsandbytes, adamw_torch_8bit torchao.
OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "adafactor", "muon", "adamw_8bit", "adamw_torch_8bit")


SCHEDULES = ("cosine_with_min_lr", "cosine", "linear", "constant", "constant_with_warmup")


def choose_optimizer(optim: str | None, muon_learning_rate: float | None = None, weight_decay: float = 0) -> None:
    choose("optim", optim or "muon", OPTIMIZERS)
    if weight_decay and (optim == "muon" or muon_learning_rate is not None):
        raise UserError(f"weight_decay: {weight_decay}; muon decays nothing: set it to 0, or take another optim")
    if muon_learning_rate is not None and optim not in (None, "muon"):
        raise UserError(f"muon_learning_rate: is of optim: muon, not of {optim}; leave one of them out")


def between(key: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UserError(f"{key}: {value} is outside [{low}, {high}]")


def term_name(term: RewardTerm) -> str:
    """What a term of the reward is called in the metrics."""
    if term.name or isinstance(term, EnsembleTerm):
        return term.name or "ensemble"
    return term.model.rstrip("/").rsplit("/", 1)[-1] if isinstance(term, ModelTerm) else term.function.split(":")[-1]


def check_term(place: str, term: RewardTerm, taken: list[str]) -> None:
    """Stops at a term that cannot be meant; `taken` are the names of the terms before it."""
    if isinstance(term, EnsembleTerm):
        choose(f"{place}.combine", term.combine, ("mean", "min", "mean_minus_std"))
        between(f"{place}.coef", term.coef, 0, 1000)
        if len(term.models) < 2:
            raise UserError(f"{place}.models: {len(term.models)} is no ensemble; give two or more, or model: PATH")
    name = term_name(term)
    if not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"{place}.name: {name!r} cannot stand in a metric; write a name of letters, digits, - and _")
    if name in taken:
        raise UserError(f"{place}.name: {name!r} is the name of reward[{taken.index(name)}] too; give this one another")


def exact_div(a: int, b: int, what: str) -> int:
    """a / b when it is whole; batch algebra never rounds."""
    if b <= 0 or a % b:
        raise UserError(f"{what}: {a} does not divide by {b}; change one so that it does")
    return a // b
