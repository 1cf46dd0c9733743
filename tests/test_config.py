"""align/config.py and parse.py: a mistake is one line that names its place, types survive YAML and flags."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from align import config as configs
from align.config import (
    BaseConfig,
    CollectConfig,
    EnsembleTerm,
    EvaluateConfig,
    EvaluateRMConfig,
    FunctionTerm,
    ModelTerm,
    PPOConfig,
    RMConfig,
    SFTConfig,
    StageConfig,
    exact_div,
    term_name,
)
from align.errors import UserError
from align.parse import ELSEWHERE, parse
from align.runtime import has_bf16

ROOT = Path(__file__).resolve().parents[1]
PATHS = ["--output_dir", "out", "--model_name_or_path", "sft", "--train_file", "prompts.jsonl"]
PPO = [*PATHS, "--reward", "[{model: rm}]", "--ptx_coef", "0"]

# A new knob must delete or justify one: change the list together with docs and presets.
FIELDS = {
    "StageConfig": """
        output_dir seed bf16 attn_implementation on_bad_rows overwrite_output_dir
    """,
    "TrainingConfig": "report_to resume_from_checkpoint save_total_limit max_grad_norm",
    "TrainerConfig": "logging_steps",
    "BaseConfig": """
        train_file validation_file vocab_size hidden_size intermediate_size num_hidden_layers
        num_attention_heads max_position_embeddings per_device_train_batch_size max_steps
        learning_rate muon_learning_rate adam_beta2 warmup_steps decay_steps save_steps
    """,
    "SFTConfig": """
        model_name_or_path chat_template_path train_file validation_file pretraining_file pretraining_fraction
        completion_only_loss all_answers max_length residual_dropout num_train_epochs learning_rate
        lr_scheduler_type warmup_steps weight_decay
        optim muon_learning_rate gradient_checkpointing per_device_train_batch_size gradient_accumulation_steps
        adam_beta1 adam_beta2 adam_epsilon save_steps reward_model_path selection_prompts
        max_new_tokens temperature use_peft lora_r lora_alpha lora_target_modules
    """,
    "CollectConfig": """
        model_name_or_path prompts_file validation_prompts_file labelers held_out_labelers
        labelers_per_prompt validation_labelers_per_prompt min_k max_k max_prompt_length max_new_tokens
        temperature per_device_batch_size
    """,
    "RMConfig": """
        model_name_or_path train_file validation_file held_out_file demonstrations_file max_length
        batch_element head_init folds_by num_folds
        num_train_epochs learning_rate lr_scheduler_type warmup_steps weight_decay
        optim muon_learning_rate gradient_checkpointing
        per_device_train_batch_size gradient_accumulation_steps per_device_eval_batch_size adam_beta1
        adam_beta2 adam_epsilon eval_steps save_steps use_peft lora_r lora_alpha
        lora_target_modules
    """,
    "PPOConfig": """
        model_name_or_path reward reward_timeout reward_retries value_model_path value_head_init
        train_file validation_file validation_prompts eval_iterations
        pretraining_file ptx_coef ptx_examples_per_episode ptx_max_length total_episodes
        rollout_batch_size num_mini_batches num_ppo_epochs per_device_train_batch_size
        per_device_rollout_batch_size microbatch_tokens
        use_vllm vllm_gpu_memory_utilization vllm_enable_sleep_mode
        old_logprobs importance_weight_cap importance_weight_band
        importance_weight_level max_prompt_length max_new_tokens temperature
        learning_rate value_learning_rate warmup_iterations value_warmup_iterations lr_decay
        adam_beta1 adam_beta2 adam_epsilon
        optim gradient_checkpointing use_peft value_use_peft lora_r lora_alpha lora_target_modules
        frozen_quantization
        kl_coef kl_estimator kl_target kl_horizon kl_stop gamma lam cliprange dual_clip cliprange_value
        whiten_advantages whiten_rewards reward_clip missing_eos_penalty missing_eos_mode
        finished_target ema_decay
        save_iterations transcript_iterations judge
    """,
    "EvaluateConfig": """
        preset run_dir base_path sft_path ppo_path ppo_ptx_path reward_model_path reward_function judge prompts_file
        few_shot_file text_file rankings_file num_prompts max_new_tokens temperature
        per_device_batch_size num_transcripts best_of
    """,
    "EvaluateRMConfig": """
        reward_model_path rankings_file held_out_file train_file peer_model_path peer_scores_file labeler_folds_file
        source_folds_file ranking_metrics_file pair_metrics_file max_length per_device_batch_size num_mistakes
        num_spread_prompts
    """,
    "EvaluateChoicesConfig": """
        base_path sft_path ppo_path ppo_ptx_path choices_file num_rows max_length per_device_batch_size
    """,
}

STAGES = {
    "base": "BaseConfig",
    "sft": "SFTConfig",
    "collect": "CollectConfig",
    "rm": "RMConfig",
    "ppo": "PPOConfig",
    "overoptimise": "PPOConfig",
    "evaluate": "EvaluateConfig",
    "evaluate_rm": "EvaluateRMConfig",
    "evaluate_choices": "EvaluateChoicesConfig",
}
PRESETS = sorted(p for p in (ROOT / "configs").glob("*/*.yaml") if p.parent.name != "accelerate")


def yaml_file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "ppo.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def ppo(*argv: str) -> PPOConfig:
    return parse(PPOConfig, [*PPO, *argv])


def fails(*argv: str, cls=PPOConfig, start=PPO) -> str:
    with pytest.raises(UserError) as caught:
        parse(cls, [*start, *argv])
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message


@pytest.mark.parametrize("name", FIELDS)
def test_fields_are_frozen(name):
    cls = getattr(configs, name)
    lines = [FIELDS[parent.__name__] for parent in reversed(cls.__mro__) if parent.__name__ in FIELDS]
    assert [f.name for f in dataclasses.fields(cls)] == " ".join(lines).split()
    assert cls.__dataclass_params__.frozen


def test_every_config_is_listed():
    found = {k for k, v in vars(configs).items() if isinstance(v, type) and issubclass(v, StageConfig)}
    assert found == set(FIELDS)


@pytest.mark.filterwarnings("ignore:.*no bfloat16")
@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_presets_parse(path):
    if path.stem in ("world", "data", "export"):  # no stage's: tests/test_presets.py
        assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)
        return
    name = STAGES.get(path.stem) or STAGES[path.stem.split("-")[0]]
    config = parse(getattr(configs, name), ["--config", str(path), "--run", "runs/x"])
    assert "{run}" not in repr(config)


# The paper's constants (reference in the config's comments)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--num_hidden_layers", "1"], "num_hidden_layers: 1"),
        (["--num_attention_heads", "1"], "num_attention_heads: 1"),
        (["--num_attention_heads", "3"], "hidden_size / num_attention_heads"),
    ],
)
def test_a_base_model_too_small_for_its_starting_weights(flags, words):
    with pytest.raises(UserError, match=words):
        parse(BaseConfig, ["--output_dir", "out", *flags])


def test_defaults_are_the_papers():
    config = ppo()
    assert (config.total_episodes, config.rollout_batch_size, config.num_mini_batches) == (256_000, 512, 8)
    assert (config.num_ppo_epochs, config.kl_coef, config.gamma, config.lam) == (1, 0.02, 1.0, 0.95)
    assert (config.cliprange, config.cliprange_value, config.ema_decay) == (0.2, 0.2, 0.992)
    assert (config.warmup_iterations, config.ptx_examples_per_episode) == (10, 8)
    assert PPOConfig.ptx_coef == 27.8
    rm = RMConfig(output_dir="o")
    assert (rm.num_train_epochs, rm.learning_rate, rm.per_device_train_batch_size) == (1.0, 9e-6, 64)


# Types


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learning_rate: 1e-3", 1e-3),  # YAML 1.1 reads this as a string
        ("learning_rate: 1.0e-3", 1e-3),
        ("learning_rate: '0.5'", 0.5),
        ("learning_rate: 1", 1.0),
        ("total_episodes: 1e3", 1000),
        ("total_episodes: 256_000", 256_000),
        ("kl_target: null", None),
        ("kl_target: ~", None),
        ("kl_target: 6", 6.0),
        ("cliprange_value: none", None),
        ("whiten_rewards: true", True),
        ("whiten_rewards: yes", True),
        ("whiten_rewards: 'False'", False),
        ("missing_eos_penalty: -1", -1.0),
        ("value_model_path: 123", "123"),
        ("value_model_path: 中文/模型", "中文/模型"),
    ],
)
def test_yaml_values(tmp_path, text, expected):
    got = getattr(ppo("--config", yaml_file(tmp_path, text)), text.split(":")[0])
    assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize(
    ("argv", "key", "expected"),
    [
        (["--missing_eos_penalty", "-2.0"], "missing_eos_penalty", -2.0),
        (["--missing_eos_penalty=-2.0"], "missing_eos_penalty", -2.0),
        (["--learning-rate", "1e-3"], "learning_rate", 1e-3),
        (["--seed", "7"], "seed", 7),
        (["--seed", "4294967295"], "seed", 4294967295),
        (["--total_episodes", "1e4"], "total_episodes", 10_000),
        (["--cliprange_value", "null"], "cliprange_value", None),
        (["--ema_decay", "None"], "ema_decay", None),
        (["--whiten_advantages", "false"], "whiten_advantages", False),
        (["--bf16", "True"], "bf16", True),
        (["--train_file", "a=b.jsonl"], "train_file", "a=b.jsonl"),
        (["--train_file=a=b.jsonl"], "train_file", "a=b.jsonl"),
    ],
)
def test_command_line_values(argv, key, expected):
    got = getattr(ppo(*argv), key)
    assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize("has", [True, False])
def test_bf16_auto_is_what_the_hardware_has(monkeypatch, has):
    monkeypatch.setattr("align.parse.has_bf16", lambda: has)
    assert ppo("--bf16", "auto").bf16 is has


def test_bf16_on_hardware_without_it_is_obeyed_and_said(monkeypatch):
    monkeypatch.setattr("align.parse.has_bf16", lambda: False)
    with pytest.warns(UserWarning, match="--bf16.*very slow.*auto"):
        assert ppo("--bf16", "true").bf16 is True


def test_the_command_line_wins_over_the_file(tmp_path):
    path = yaml_file(tmp_path, "seed: 1\ngamma: 0.5")
    assert ppo("--config", path, "--seed", "2").seed == 2
    assert ppo("--seed", "2", "--config", path).gamma == 0.5


def test_an_empty_file_is_no_mistake(tmp_path):
    assert ppo("--config", yaml_file(tmp_path, "")) == ppo()


def test_run_fills_in_paths(tmp_path):
    path = yaml_file(tmp_path, "pretraining_file: '{run}/data/prompts.jsonl'")
    assert ppo("--config", path, "--run", "runs/tiny-seed2").pretraining_file == "runs/tiny-seed2/data/prompts.jsonl"
    message = fails("--config", path)
    assert "ppo.yaml: pretraining_file" in message and "--run" in message


# The list `reward`

TERMS = (
    ModelTerm("runs/x/rm"),
    EnsembleTerm(("a", "b/c"), "mean_minus_std", 0.5, 2.0, "crowd"),
    FunctionTerm("mine:short", weight=0.5),
)


def test_reward_in_a_file(tmp_path):
    text = """
reward:
  - model: "{run}/rm"
  - {models: [a, b/c], combine: mean_minus_std, coef: 0.5, weight: 2, name: crowd}
  - function: mine:short
    weight: 5e-1
"""
    start = [*PATHS, "--ptx_coef", "0", "--config", yaml_file(tmp_path, text)]
    config = parse(PPOConfig, [*start, "--run", "runs/x"])
    assert config.reward == TERMS
    assert [term_name(term) for term in TERMS] == ["rm", "crowd", "short"]
    assert "ppo.yaml: reward[0].model: '{run}/rm' names a run" in fails(start=start)


@pytest.mark.parametrize(
    "text",
    [
        "[{model: runs/x/rm}, {models: [a, b/c], combine: mean_minus_std, coef: .5, weight: 2, name: crowd}, "
        "{function: mine:short, weight: 0.5}]",
        '[{"model": "{run}/rm"}, {"models": ["a", "b/c"], "combine": "mean_minus_std", "coef": 0.5, "weight": 2.0, '
        '"name": "crowd"}, {"function": "mine:short", "weight": 0.5}]',
    ],
    ids=["yaml", "json"],
)
def test_reward_on_the_command_line(text):
    assert ppo("--reward", text, "--run", "runs/x").reward == TERMS


def test_a_list_of_names(tmp_path):
    start = [
        word
        for key in ("output_dir", "model_name_or_path", "train_file", "validation_file")
        for word in (f"--{key}", "x")
    ]
    assert parse(SFTConfig, start).lora_target_modules == ()
    assert parse(SFTConfig, [*start, "--lora_target_modules", "[q_proj, v_proj]"]).lora_target_modules == (
        "q_proj",
        "v_proj",
    )
    assert parse(SFTConfig, [*start, "--lora_target_modules", '["up"]']).lora_target_modules == ("up",)
    assert parse(SFTConfig, [*start, "--lora_target_modules", "null"]).lora_target_modules == ()
    (tmp_path / "c.yaml").write_text("lora_target_modules: [q_proj]\n", encoding="utf-8")
    assert parse(SFTConfig, [*start, "--config", str(tmp_path / "c.yaml")]).lora_target_modules == ("q_proj",)
    for wrong, word in (("q_proj", "is no list; write [ONE, ANOTHER]"), ("[{a: b}]", "[0]"), ("[", "neither YAML")):
        assert word in fails("--lora_target_modules", wrong, cls=SFTConfig, start=start)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("runs/tiny/rm", ["--reward", "'runs/tiny/rm' is no list", "{model: PATH}"]),
        ("[", ["--reward", "neither YAML nor JSON"]),
        ("[a]", ["--reward[0]: 'a' must have one of model, models and function"]),
        ("[{weight: 1}]", ["--reward[0]", "must have one of"]),
        ("[{model: a, function: b:c}]", ["--reward[0]", "must have one of"]),
        ("[{model: a}, {function: b:c, weight: x}]", ["--reward[1].weight: 'x' is not a float"]),
        ("[{model: a, weight: .nan}]", ["--reward[0].weight"]),
        ("[{model: a, wieght: 1}]", ["--reward[0].wieght: unknown key; did you mean 'weight'?"]),
        ("[{model: a, coef: 1}]", ["--reward[0].coef: unknown key", "ModelTerm"]),
        ('[{model: a, "x\\ny": 1}]', ["--reward[0].'x\\ny': unknown key"]),
        ("[{model: [a]}]", ["--reward[0].model", "not a str"]),
        ("[{models: a}]", ["--reward[0].models: 'a' is no list"]),
        ("[{models: [a, {b: c}]}]", ["--reward[0].models[1]", "not a str"]),
        ("[{models: [a]}]", ["reward[0].models: 1 is no ensemble"]),
        ("[{models: [a, b], combine: max}]", ["reward[0].combine: 'max'", "mean, min, mean_minus_std"]),
        ("[{models: [a, b], coef: -1}]", ["reward[0].coef", "outside"]),
        ("[{model: x/rm}, {model: y/rm/}]", ["reward[1].name: 'rm' is the name of reward[0] too"]),
        ("[{model: a, name: b c}]", ["reward[0].name: 'b c' cannot stand in a metric"]),
    ],
    ids=str,
)
def test_mistakes_in_the_reward(text, parts):
    message = fails("--reward", text)
    assert all(part in message for part in parts), message


# Mistakes: one line, the place, the remedy


def test_unknown_key_is_suggested(tmp_path):
    assert fails("--learning_rat", "1") == "--learning_rat: unknown key; did you mean 'learning_rate'?"
    message = fails("--config", yaml_file(tmp_path, "klcoef: 0.1"))
    assert "ppo.yaml: klcoef" in message and "'kl_coef'" in message


def test_a_positive_score_for_answers_that_do_not_end_is_warned_of():
    """TRL's sign: there it is subtracted."""
    with pytest.warns(UserWarning, match="missing_eos_penalty: 1.0 is the score.*missing_eos_mode: subtract"):
        assert parse(PPOConfig, [*PPO, "--missing_eos_penalty", "1.0"]).missing_eos_penalty == 1.0


def test_keys_of_other_libraries_are_not_guessed_by_their_spelling():
    """`difflib` finds value_model_path, ema_decay, kl_coef and reward_clip for the first four."""
    assert fails("--reward_model_path", "x") == "--reward_model_path: unknown key; " + ELSEWHERE["reward_model_path"]
    assert "no weight decays in this stage" in fails("--weight_decay", "0")
    assert "num_mini_batches" in fails("--train_batch_size", "64")
    for cls in (SFTConfig, RMConfig):  # where the advice would be about keys that the stage does not have
        message = fails("--train_batch_size", "64", cls=cls, start=["--output_dir", "x"])
        assert message == "--train_batch_size: unknown key; did you mean 'per_device_train_batch_size'?"
    assert "value_learning_rate" in fails("--vf_coef", "0.1")
    assert fails("--eps_clip", "0.2") == "--eps_clip: unknown key; did you mean 'cliprange'?"
    assert "did you mean 'max_new_tokens'" in fails("--response_length", "53")


@pytest.mark.parametrize("key", ELSEWHERE)
def test_what_is_said_of_foreign_keys_names_keys_that_exist(key):
    known = {f.name for cls in (PPOConfig, SFTConfig, RMConfig) for f in dataclasses.fields(cls)}
    hints = [ELSEWHERE[key]] if isinstance(ELSEWHERE[key], str) else ELSEWHERE[key]
    for hint in hints:
        named = {hint} if " " not in hint else set(re.findall(r"[a-z]+(?:_[a-z]+)+", hint))
        assert named <= known and hint != key
    assert len(hints) == 1 or all(" " not in hint for hint in hints[:-1]) or " " not in hints[-1]


def test_unknown_key_like_nothing_else_has_a_remedy_too():
    message = fails("--zzz", "1")
    assert message.startswith("--zzz: unknown key") and message != "--zzz: unknown key"


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["oops"], ["'oops'", "--key value"]),
        (["--seed"], ["--seed", "has no value", "--seed VALUE"]),
        (["--seed", "--gamma", "1"], ["--seed", "has no value"]),
        (["--seed", "1.5"], ["--seed", "'1.5'", "int"]),
        (["--seed", "x"], ["--seed", "'x'", "int"]),
        (["--seed", "nan"], ["--seed", "int"]),
        (["--seed", "inf"], ["--seed", "int"]),
        (["--seed", "null"], ["--seed", "int"]),
        (["--seed", "a\nb"], ["--seed", "int"]),
        (["--gamma", "much"], ["--gamma", "'much'", "float"]),
        (["--bf16", "1"], ["--bf16", "'1'", "bool"]),
        (["--output_dir", ""], ["output_dir", "empty", "--output_dir"]),
        (["--kl_estimator", "k4"], ["kl_estimator", "'k4'", "k1, k2, k3"]),
        (["--missing_eos_mode", "x"], ["missing_eos_mode", "replace, subtract"]),
        (["--max_grad_norm", "-1"], ["max_grad_norm", "outside"]),
        (["--lr_decay", "x"], ["lr_decay", "constant, linear"]),
        (["--old_logprobs", "x"], ["old_logprobs", "recompute, sampler"]),
        (["--value_head_init", "x"], ["value_head_init", "kept, fitted"]),
        (["--value_head_init", "fitted", "--rollout_batch_size", "4"], ["value_head_init", "rollout_batch_size 5"]),
        (["--importance_weight_cap", "0.9"], ["importance_weight_cap", "0.9", "under 1"]),
        (["--importance_weight_band", "0.5"], ["importance_weight_band", "under 1"]),
        (["--importance_weight_level", "word"], ["importance_weight_level", "token, sequence"]),
        (["--importance_weight_level", "sequence"], ["importance_weight_level", "importance_weight_cap"]),
        (["--importance_weight_cap", "2", "--old_logprobs", "sampler"], ["importance_weight_cap", "recompute"]),
        (["--num_ppo_epochs", "0"], ["num_ppo_epochs", "outside"]),
        (["--per_device_rollout_batch_size", "0"], ["per_device_rollout_batch_size", "outside"]),
        (["--total_episodes", "0"], ["total_episodes", "outside"]),
        (["--lam", "1.1"], ["lam", "outside"]),
        (["--cliprange", "0"], ["cliprange", "outside"]),
        (["--kl_target", "0"], ["kl_target", "outside"]),
        (["--kl_horizon", "-1"], ["kl_horizon", "outside"]),
        (["--train_file", ""], ["train_file: missing", "--train_file"]),
        (["--on_bad_rows", "skip"], ["on_bad_rows", "stop, drop"]),
        (["--report_to", "mlflow"], ["report_to", "none, wandb, tensorboard"]),
        (["--temperature", "0"], ["temperature", "outside"]),
        (["--reward", "null"], ["reward: missing", "{model: PATH}", "{function: package.module:name}"]),
        (["--reward_timeout", "0"], ["reward_timeout", "more than 0"]),
        (["--reward_retries", "-1"], ["reward_retries", "outside"]),
        (["--kl_stop", "0"], ["kl_stop", "more than 0"]),
        (["--ptx_coef", "1"], ["pretraining_file", "ptx_coef: 0"]),
        (["--ptx_max_length", "1"], ["ptx_max_length", "1"]),
        (["--reward", "[]"], ["reward: missing"]),
        (["--optim", "adam"], ["optim", "'adam'", "adamw_torch_fused", "muon"]),
        (["--lora_r", "0"], ["lora_r", "outside"]),
        (["--frozen_quantization", "int4"], ["frozen_quantization", "'int4'", "int8"]),
        (["--config", "no/such.yaml"], ["no/such.yaml", "give an existing file"]),
    ],
    ids=str,
)
def test_command_line_mistakes(argv, parts):
    message = fails(*argv)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_number_is_finite(value):
    assert "--kl_coef" in fails("--kl_coef", value)


@pytest.mark.parametrize(
    ("cls", "argv", "parts"),
    [
        (SFTConfig, ["--pretraining_fraction", "0.1"], ["pretraining_file", "missing"]),
        (SFTConfig, ["--pretraining_fraction", "1.5"], ["pretraining_fraction", "outside"]),
        (SFTConfig, ["--residual_dropout", "-0.1"], ["residual_dropout", "outside"]),
        (SFTConfig, ["--optim", "adamw"], ["optim", "'adamw'", "adafactor"]),
        (SFTConfig, ["--selection_prompts", "0"], ["selection_prompts", "outside"]),
        (RMConfig, ["--lora_r", "-1"], ["lora_r", "outside"]),
        (RMConfig, ["--folds_by", "labeler", "--resume_from_checkpoint", "x"], ["one checkpoint is of one fold"]),
        (RMConfig, ["--optim", "adafactor", "--muon_learning_rate", "1e-3"], ["muon_learning_rate", "adafactor"]),
        (SFTConfig, ["--optim", "muon", "--weight_decay", "0.1"], ["weight_decay: 0.1", "muon decays nothing"]),
        (RMConfig, ["--muon_learning_rate", "1e-3", "--weight_decay", "0.1"], ["weight_decay: 0.1"]),
        (RMConfig, ["--weight_decay", "-0.1"], ["weight_decay: -0.1 is outside"]),
        (SFTConfig, ["--lr_scheduler_type", "cosin"], ["lr_scheduler_type: 'cosin' is not one of", "linear, constant"]),
        (configs.CollectConfig, ["--min_k", "1"], ["min_k", "2 <= min_k"]),
        (configs.CollectConfig, ["--min_k", "6", "--max_k", "5"], ["min_k", "max_k"]),
        (SFTConfig, ["--temperature", "-1"], ["temperature", "outside"]),
        (configs.CollectConfig, ["--temperature", "-1"], ["temperature", "outside"]),
        (EvaluateConfig, ["--temperature", "0"], ["temperature", "outside"]),
        (EvaluateConfig, ["--num_prompts", "1"], ["num_prompts: 1", "2 or more"]),
        (EvaluateConfig, ["--best_of", "1"], ["best_of: 1", "2 or more, or 0"]),
        (EvaluateConfig, ["--best_of", "-4"], ["best_of: -4", "2 or more, or 0"]),
        (EvaluateConfig, ["--best_of", "4", "--temperature", "0"], ["best_of", "all alike", "temperature: 1"]),
        (EvaluateConfig, ["--judg", "x"], ["--judg", "'judge'"]),
        (EvaluateConfig, ["--resume_from_checkpoint", "latest"], ["resume_from_checkpoint", "unknown key"]),
        (configs.CollectConfig, ["--report_to", "wandb"], ["report_to", "unknown key"]),
        (PPOConfig, ["--logging_steps", "5"], ["logging_steps", "unknown key"]),
        (RMConfig, ["--batch_element", "x"], ["batch_element", "ranking, pair"]),
        (RMConfig, ["--head_init", "x"], ["head_init", "normal, fitted"]),
        (RMConfig, ["--num_train_epochs", "0"], ["num_train_epochs: 0.0 trains nothing", "fit the head"]),
        (RMConfig, ["--num_train_epochs", "-1", "--head_init", "fitted"], ["num_train_epochs: -1.0"]),
        (RMConfig, ["--folds_by", "x"], ["folds_by", "labeler, source"]),
        (RMConfig, ["--num_folds", "1"], ["num_folds", "2 or more"]),
        (EvaluateRMConfig, ["--peer_model_path", "x", "--peer_scores_file", "y"], ["peer_scores_file", "one peer"]),
    ],
    ids=str,
)
def test_mistakes_of_other_stages(cls, argv, parts):
    message = fails(*argv, cls=cls, start=["--output_dir", "out"])
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("name", [name for name in FIELDS])
def test_output_dir_is_required(name):
    message = fails(cls=getattr(configs, name), start=[])
    assert message.startswith("output_dir: missing") and "--output_dir" in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("seed: [", ["ppo.yaml:1", "not valid YAML", "mend"]),
        ("gamma: 1\n  seed: 2", ["ppo.yaml:2", "not valid YAML"]),
        ("- seed", ["ppo.yaml", "`key: value`"]),
        ("just words", ["ppo.yaml", "`key: value`"]),
        ("1: 2", ["ppo.yaml", "`key: value`"]),
        ("seed: true", ["ppo.yaml: seed", "True", "int"]),
        ("learning_rate: [1, 2]", ["ppo.yaml: learning_rate", "float"]),
        ("gamma: {a: 1}", ["ppo.yaml: gamma", "float"]),
        ("judge: true", ["ppo.yaml: judge", "str"]),
        ("bf16: 'on'", ["ppo.yaml: bf16", "bool"]),
        ("output_dir: x\nconfig: other.yaml", ["ppo.yaml: config", "unknown key"]),
        ("seed: !!python/object/apply:os.getcwd []", ["ppo.yaml:1", "not valid YAML"]),
        ("seed: 2020-99-99", ["ppo.yaml", "not valid YAML"]),  # PyYAML raises ValueError for it
        ("seed: " + "[" * 5000, ["ppo.yaml", "not valid YAML"]),  # and RecursionError for this
    ],
    ids=lambda value: str(value)[:40],
)
def test_yaml_mistakes(tmp_path, text, parts):
    message = fails("--config", yaml_file(tmp_path, text))
    assert all(part in message for part in parts), message


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "ppo.yaml"
    path.write_bytes(b"\xff\xfe\x00seed")
    assert "not valid YAML" in fails("--config", str(path))
    assert str(tmp_path) in fails("--config", str(tmp_path))


def test_exact_div():
    assert exact_div(512, 8, "rollout_batch_size / num_mini_batches") == 64
    for a, b in ((512, 7), (5, 0), (5, -1)):
        with pytest.raises(UserError, match="minibatch: .* does not divide"):
            exact_div(a, b, "minibatch")


# Fuzz: whatever a user types, a config or one line

keys = st.sampled_from([f.name for f in dataclasses.fields(PPOConfig)]) | st.text(max_size=8)
words = st.sampled_from(["1", "-1", "0.5", "1e-3", "null", "true", "nan", "k1", "", "--"]) | st.text(max_size=8)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates()
values = scalars | st.lists(scalars, max_size=2) | st.dictionaries(st.text(max_size=3), scalars, max_size=2)


def parses_or_says_why(argv: list[str]) -> None:
    try:
        config = parse(PPOConfig, argv)
    except UserError as error:
        assert len(str(error).splitlines()) == 1, str(error)
    else:
        for field in dataclasses.fields(config):
            got, hint = getattr(config, field.name), str(field.type)
            assert got is None or type(got).__name__ in hint, f"{field.name}: {got!r} is not {hint}"


@given(st.lists(st.tuples(keys, words), max_size=4))
def test_fuzz_command_line(pairs):
    parses_or_says_why([*PPO, *(word for key, value in pairs for word in (f"--{key}", value))])


def test_a_key_that_breaks_the_line_is_refused_in_one():
    for argv in (["--a\nb"], ["--a\nb", "1"], ["--a\x85b"]):
        with pytest.raises(UserError, match="not a key") as error:
            parse(PPOConfig, argv)
        assert len(str(error.value).splitlines()) == 1


@given(st.lists(words, max_size=5))
def test_fuzz_words(argv):
    parses_or_says_why(argv)


@given(st.dictionaries(keys, values, max_size=4))
def test_fuzz_yaml(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    parses_or_says_why([*PPO, "--config", str(path)])


@given(st.text(max_size=40))
def test_fuzz_yaml_text(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(text, encoding="utf-8", errors="ignore")
    parses_or_says_why([*PPO, "--config", str(path)])


@pytest.mark.parametrize(
    ("instructions", "has"), [({"avx2": True, "avx512_bf16": False}, False), ({"avx512_bf16": True}, True),
                              ({"architecture": "aarch64", "bf16": True}, True), ({}, False)],
)  # fmt: skip
def test_has_bf16_reads_the_cpus_instructions(monkeypatch, instructions, has):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: instructions)
    assert has_bf16() is has


def test_help_lists_every_key_with_its_default_and_meaning(capsys):
    with pytest.raises(SystemExit) as end:
        parse(PPOConfig, ["--help"])
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    keys = [line.split()[0] for line in lines if line.startswith("  --")]
    assert keys == [f"--{f.name}" for f in dataclasses.fields(PPOConfig)]
    (line,) = [line for line in lines if line.startswith("  --kl_stop ")]
    assert line.startswith("  --kl_stop null  # given: the run ends after an iteration")
    assert '  --old_logprobs "recompute"  # by the training forward' in "\n".join(lines)
    assert any(line.startswith("  --seed 0") for line in lines), "inherited ones too"


def test_a_bare_flag_of_a_yes_or_no_is_yes():
    assert ppo("--use_peft").use_peft is True
    config = ppo("--use_peft", "--learning_rate", "0.5", "--gradient_checkpointing")
    assert (config.use_peft, config.learning_rate, config.gradient_checkpointing) == (True, 0.5, True)
    assert ppo("--use-peft", "false").use_peft is False
    assert "has no value" in fails("--learning_rate")


@pytest.mark.parametrize(
    ("cls", "key", "value"),
    [
        (SFTConfig, "gradient_accumulation_steps", "0"), (SFTConfig, "per_device_train_batch_size", "0"),
        (SFTConfig, "learning_rate", "-1e-5"), (RMConfig, "per_device_eval_batch_size", "0"),
        (RMConfig, "eval_steps", "-1"), (PPOConfig, "ptx_coef", "-27.8"), (PPOConfig, "kl_coef", "-0.02"),
        (PPOConfig, "ptx_examples_per_episode", "-8"), (PPOConfig, "save_iterations", "-1"),
        (CollectConfig, "per_device_batch_size", "0"), (PPOConfig, "reward_clip", "-5"), (SFTConfig, "seed", "-1"),
    ],
)  # fmt: skip
def test_numbers_that_cannot_be_meant_are_refused(cls, key, value):
    assert fails(f"--{key}", value, cls=cls, start=["--output_dir", "x"]).startswith(f"{key}: ")


def test_no_answer_is_learned_twice():
    with pytest.raises(UserError, match="all_answers: .*set completion_only_loss: true"):
        SFTConfig("out", all_answers=True, completion_only_loss=False)


def test_a_base_run_too_short_for_its_schedule_is_refused():
    """Of a rate that rises for 100 steps and falls for 900, 500 steps would jump from 1 to 0.44 between two."""
    with pytest.raises(UserError, match="max_steps: 500 is under warmup_steps 100 . decay_steps 900"):
        BaseConfig(output_dir="x", max_steps=500)


def test_what_a_stage_reads_does_not_lie_in_the_folder_that_it_may_empty(tmp_path):
    for name in ("rm", "own"):
        (tmp_path / name).mkdir()
    mine = tmp_path / "own" / "demonstrations.jsonl"
    mine.write_text("")
    SFTConfig(str(tmp_path / "sft"), model_name_or_path="org/name", train_file=f"org/data,{mine}")
    with pytest.raises(UserError, match=r"output_dir: .*own holds train_file .*demonstrations.jsonl; choose another"):
        SFTConfig(str(tmp_path / "own"), model_name_or_path="org/name", train_file=f"org/data,{mine}")
    with pytest.raises(UserError, match="holds model_name_or_path"):
        RMConfig(str(tmp_path / "rm"), model_name_or_path=str(tmp_path / "rm"))
    for reward in (ModelTerm(str(tmp_path / "rm")), EnsembleTerm((str(tmp_path / "own"), str(tmp_path / "rm")))):
        with pytest.raises(UserError, match=r"holds reward\[0\] .*rm; choose another"):
            PPOConfig(str(tmp_path / "rm"), reward=(reward,), ptx_coef=0, missing_eos_penalty=None)
    EvaluateRMConfig(str(tmp_path / "rm"), reward_model_path=str(tmp_path / "rm"))  # its report lies beside the model
