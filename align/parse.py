"""YAML and `--key value` -> a config, or one line that names the key and says how to mend it."""

import dataclasses
import difflib
import inspect
import json
import math
import re
import types
import typing
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

import yaml

from align.config import EnsembleTerm, FunctionTerm, ModelTerm, RewardTerm
from align.errors import UserError
from align.runtime import has_bf16

Config = TypeVar("Config")

KEY = re.compile(r"[a-z]+(?:_[a-z]+)+")
# Names of TRL, OpenRLHF and verl whose nearest spelling here means something else: the key, or what to do in a stage
# that has the keys it names. Of several, the first that fits the stage.
ELSEWHERE = {
    "reward_model_path": "stage ppo takes a list, reward: [{model: PATH}]",
    "reward_funcs": "stage ppo takes a list, reward: [{function: package.module:name}]",
    "sft_model_path": "model_name_or_path",
    "pretrain": "model_name_or_path",
    "dataset_name": "train_file",
    "prompt_data": "train_file",
    "weight_decay": "no weight decays in this stage",
    "vf_coef": "the value model is a model of its own, at value_learning_rate",
    "eps_clip": "cliprange",
    "clip_ratio": "cliprange",
    "value_clip": "cliprange_value",
    "init_kl_coef": "kl_coef",
    "beta": "kl_coef",
    "lambd": "lam",
    "critic_learning_rate": "value_learning_rate",
    "actor_learning_rate": "learning_rate",
    "n_samples_per_prompt": "a prompt is answered once an iteration; rollout_batch_size says how many are",
    "num_generations": "a prompt is answered once an iteration; rollout_batch_size says how many are",
    "train_batch_size": (
        "an optimiser step takes rollout_batch_size / num_mini_batches episodes",
        "per_device_train_batch_size",
    ),
    "response_length": "max_new_tokens",
    "generate_max_len": "max_new_tokens",
    "max_completion_length": "max_new_tokens",
    "prompt_max_len": "max_prompt_length",
    "local_rollout_forward_batch_size": "per_device_rollout_batch_size",
    "micro_rollout_batch_size": "per_device_rollout_batch_size",
    "micro_train_batch_size": "per_device_train_batch_size",
    "gradient_accumulation_steps": "an optimiser step takes rollout_batch_size / num_mini_batches episodes",
    "num_epochs": ("num_train_epochs", "num_ppo_epochs"),
    "max_epochs": ("num_train_epochs", "num_ppo_epochs"),
    "num_train_epochs": "num_ppo_epochs goes over a rollout again, total_episodes says how long the run is",
    "ppo_epochs": "num_ppo_epochs",
    "max_len": "max_length",
    "max_seq_length": "max_length",
    "max_steps": ("num_train_epochs", "total_episodes"),
    "eval_dataset": "validation_file",
    "val_files": "validation_file",
    "test_freq": ("eval_iterations", "eval_steps", "evaluation comes after each of num_train_epochs"),
    "eval_steps": ("eval_iterations", "evaluation comes after each of num_train_epochs"),
    "eval_strategy": ("eval_iterations", "eval_steps", "evaluation comes after each of num_train_epochs"),
    "save_strategy": ("save_iterations", "save_steps"),
    "warmup_steps": ("warmup_iterations", "this stage has no warm-up"),
    "warmup_ratio": ("warmup_iterations", "warmup_steps", "this stage has no warm-up"),
    "lr_warmup_ratio": ("warmup_iterations", "warmup_steps", "this stage has no warm-up"),
    "lr_scheduler_type": "lr_decay",
    "lr_scheduler": ("lr_decay", "lr_scheduler_type"),
    "assistant_only_loss": "all_answers",
    "freezing_actor_steps": "value_warmup_iterations",
    "critic_warmup": "value_warmup_iterations",
    "entropy_coef": "there is no entropy bonus; kl_coef holds the policy near its start",
    "entropy_loss_coef": "there is no entropy bonus; kl_coef holds the policy near its start",
    "lora_dropout": "adapters have no dropout",
    "lora_rank": "lora_r",
    "lora_task_type": "the stage knows its task",
    "eos_token": "the tokenizer's EOS ends a response",
    "stop_token": "the tokenizer's EOS ends a response; missing_eos_penalty is for the others",
    "pad_token": "the tokenizer's own, or EOS",
    "num_labels": "a reward model has one label",
    "deepspeed": "launch with configs/accelerate/fsdp2.yaml to shard models",
    "zero_stage": "launch with configs/accelerate/fsdp2.yaml to shard models",
    "push_to_hub": "a stage writes a folder with a model card: hf upload ORG/NAME FOLDER",
    "hub_model_id": "a stage writes a folder with a model card: hf upload ORG/NAME FOLDER",
    "dataset_train_split": "train_file takes ORG/NAME:SPLIT",
    "dataset_config": "train_file takes a hub id or files (docs/formats.md)",
    "run_name": "set WANDB_NAME in the environment",
    "wandb_project": "set WANDB_PROJECT in the environment",
    "logging_dir": "metrics.jsonl lies in output_dir",
    "packing": "rows of train_file are packed wherever the model can read packs",
    "center_rewards_coefficient": "the mean score of demonstrations is subtracted, which centres them",
    "chat_template_path": "stage sft takes one and saves it with the model",
    "load_in_8bit": "frozen_quantization: int8 rounds the models of stage ppo that only score",
    "load_in_4bit": "models are not loaded in 4 bits; use_peft and gradient_checkpointing save memory",
}

CLOSE = 0.75  # how like a key of ours a mistyped one must be

TERMS = {"model": ModelTerm, "models": EnsembleTerm, "function": FunctionTerm}


def parse(cls: type[Config], argv: list[str]) -> Config:
    """`--config FILE` (YAML), then `--key value` or `--key=value` over it, into a `cls`.

    `--run DIR` fills the `{run}` of any value, so that a preset can name the files of the run it belongs to.
    """
    if {"-h", "--help"} & set(argv):
        print(describe(cls))
        raise SystemExit(0)
    hints = typing.get_type_hints(cls)
    flags = read_flags(argv, bare={name for name, hint in hints.items() if hint is bool})
    run = flags.pop("run", None)
    values: dict[str, tuple[Any, str]] = {}
    config_file = flags.pop("config", None)
    if config_file is not None:
        values = {key: (value, f"{config_file}: {key}") for key, value in _read_yaml(Path(config_file)).items()}
    values |= {key: (value, f"--{key}") for key, value in flags.items()}
    names = [f.name for f in dataclasses.fields(cls)]
    for key, (_, place) in values.items():
        if key not in names:
            raise _unknown(key, place, cls)
    for name in _required(cls):
        if name not in values:
            raise _missing(name)
    if "bf16" in values:
        values["bf16"] = _bf16(*values["bf16"])
    filled = {key: (_fill(value, run, place), place) for key, (value, place) in values.items()}
    config = cls(**{key: _convert(value, hints[key], place) for key, (value, place) in filled.items()})
    for f in dataclasses.fields(cls):  # a path that a stage cannot do without
        if f.default == "" == getattr(config, f.name) and f.name not in config.not_needed():
            raise _missing(f.name)
    return config


def _missing(name: str) -> UserError:
    return UserError(f"{name}: missing; set it in the config file or with --{name}")


def _required(cls: type) -> list[str]:
    missing = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(cls) if f.default is missing and f.default_factory is missing]


def _unknown(key: str, place: str, cls: type) -> UserError:
    known = [f.name for f in dataclasses.fields(cls)]
    hints = ELSEWHERE.get(key, ())
    for hint in [hints] if isinstance(hints, str) else hints:
        if hint in known:
            return UserError(f"{place}: unknown key; did you mean {hint!r}?")
        if " " in hint and set(KEY.findall(hint)) <= set(known):
            return UserError(f"{place}: unknown key; {hint}")
    close = difflib.get_close_matches(key, known, n=1, cutoff=CLOSE)
    remedy = f"did you mean {close[0]!r}?" if close else f"{cls.__name__} in {cls.__module__} lists the keys"
    return UserError(f"{place}: unknown key; {remedy}")


def _bf16(value: Any, place: str) -> tuple[bool, str]:
    """`auto` as what it means on this machine, so that a manifest says what was computed."""
    if value == "auto":
        return has_bf16(), place
    value = _convert(value, bool, place)
    if value and not has_bf16():
        warnings.warn(f"{place}: this hardware has no bfloat16 products and is very slow in it; set auto", stacklevel=2)
    return value, place


def _fill(value: Any, run: str | None, place: str) -> Any:
    if isinstance(value, list):
        return [_fill(item, run, f"{place}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict):
        return {key: _fill(item, run, f"{place}.{key}") for key, item in value.items()}
    if not isinstance(value, str) or "{run}" not in value:
        return value
    if run is None:
        raise UserError(f"{place}: {value!r} names a run; say which with --run, e.g. --run runs/tiny")
    return value.replace("{run}", run)


def describe(cls: type) -> str:
    """Each key of a config with its default and the comment that stands beside it, for `--help`."""
    comments = {}
    for base in reversed(cls.__mro__[:-1]):
        lines = inspect.getsource(base).splitlines()
        found = (re.match(r"    (\w+): [^=#]+(?:=[^#]*)?(?:  # (.*))?$", line) for line in lines)
        comments |= {match[1]: match[2] or "" for match in found if match}
    rows = []
    for f in dataclasses.fields(cls):
        default = "" if f.default in (dataclasses.MISSING, "") else f" {json.dumps(f.default)}"
        comment = comments.get(f.name)
        rows.append(f"  --{f.name}{default}" + (f"  # {comment}" if comment else ""))
    first = inspect.getdoc(cls).split("\n")[0]
    usage = "--config FILE --run DIR (for {run} in values), then these, each with its default:"
    return "\n".join([first, usage, *rows])


def read_flags(argv: list[str], bare: Collection[str] | None = ()) -> dict[str, str]:
    """`--key value` and `--key=value` by key; a key of `bare` (None: any) may stand alone, which means true."""
    flags, words = {}, list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise UserError(f"{word!r}: expected --key value")
        key, equals, value = word[2:].partition("=")
        if not key.isprintable():
            raise UserError(f"{word!r}: not a key; write --key value")
        alone = not equals and (not words or words[0].startswith("--"))
        if alone and (bare is None or key.replace("-", "_") in bare):
            value = "true"
        elif not equals:
            if alone:
                raise UserError(f"--{key}: has no value; write --{key} VALUE")
            value = words.pop(0)
        flags[key.replace("-", "_")] = value
    return flags


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the config ({error.strerror}); give an existing file") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        where = f":{error.problem_mark.line + 1}" if getattr(error, "problem_mark", None) else ""
        raise UserError(f"{path}{where}: not valid YAML; mend its syntax") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) and key.isprintable() for key in content):
        raise UserError(f"{path}: must hold `key: value` lines")
    return content


def _convert(value: Any, hint: Any, place: str) -> Any:
    """A YAML value or a command-line string to the field's type."""
    if hint == tuple[RewardTerm, ...]:
        return _terms(value, place)
    if typing.get_origin(hint) is tuple:
        items, item_hint = _listed(value, place, "[ONE, ANOTHER]"), typing.get_args(hint)[0]
        return tuple(_convert(item, item_hint, f"{place}[{i}]") for i, item in enumerate(items))
    if typing.get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise UserError(f"{place}: {value!r} is no mapping; write `name: value` lines")
        return {str(key): _convert(item, typing.get_args(hint)[1], f"{place}.{key}") for key, item in value.items()}
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(None) in options and (value is None or value in ("null", "none", "None")):
        return None
    kind = next(option for option in options if option is not type(None))
    if dataclasses.is_dataclass(kind):
        return _nested(kind, value, place)
    try:
        if kind is bool:
            return _as_bool(value)
        if kind is int:
            return _as_int(value)
        if kind is float and not isinstance(value, bool) and math.isfinite(float(value)):
            return float(value)
        if kind is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise UserError(f"{place}: {value!r} is not {'a ' + kind.__name__}")


def _terms(value: Any, place: str) -> tuple[RewardTerm, ...]:
    """The list `reward`."""
    items = _listed(value, place, "[{model: PATH}] or [{function: module:name}]")
    return tuple(_term(item, f"{place}[{i}]") for i, item in enumerate(items))


def _listed(value: Any, place: str, example: str) -> list:
    """A list; on the command line as text, in YAML or JSON. Null is an empty one."""
    if isinstance(value, str):
        try:
            value = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError):
            raise UserError(f"{place}: {value!r} is neither YAML nor JSON; write '{example}'") from None
    if value is None:
        return []
    if not isinstance(value, list):
        raise UserError(f"{place}: {value!r} is no list; write {example}")
    return value


def _term(value: Any, place: str) -> RewardTerm:
    kinds = [key for key in TERMS if key in value] if isinstance(value, dict) else []
    if len(kinds) != 1:
        raise UserError(f"{place}: {value!r} must have one of model, models and function; write {{model: PATH}}")
    return _nested(TERMS[kinds[0]], value, place)


def _nested(cls: type[Config], value: Any, place: str) -> Config:
    """A mapping as a `cls`; an unknown key is an error, and so is a missing one."""
    if not isinstance(value, dict):
        raise UserError(f"{place}: {value!r} is no mapping; write `key: value` lines")
    hints = typing.get_type_hints(cls)
    for key in value:
        if key not in hints:
            name = key if isinstance(key, str) and key.isprintable() else repr(key)
            raise _unknown(name, f"{place}.{name}", cls)
    for name in _required(cls):
        if name not in value:
            raise UserError(f"{place}.{name}: missing; {cls.__name__} needs it")
    return cls(**{key: _convert(item, hints[key], f"{place}.{key}") for key, item in value.items()})


def _as_int(value: Any) -> int:
    if isinstance(value, bool):
        raise ValueError
    try:
        return int(value) if isinstance(value, (int, str)) else _whole(value)
    except ValueError:
        return _whole(value)


def _whole(value: Any) -> int:
    number = float(value)
    if number != int(number):
        raise ValueError
    return int(number)


def _as_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false", "yes", "no"):
        return value.lower() in ("true", "yes")
    raise ValueError
