"""The presets as wholes: what one stage writes the next one reads, batches divide, sizes are those that they cite."""

import dataclasses
import re
from pathlib import Path

import pytest

from align import config as configs
from align.parse import parse
from align.prepare import PrepareConfig
from align.rows import HUB_ID
from align.update import BatchAlgebra
from data.gguf import ExportConfig
from tests.test_config import PRESETS, STAGES

pytestmark = pytest.mark.filterwarnings("ignore:.*no bfloat16")  # what runs elsewhere may not run here
ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted({path.parent.name for path in PRESETS})
CLUSTER = ("tldr-pythia-1b", "hh-llama-8b", "instructgpt-175b")  # not run here
OTHERS = {"data": PrepareConfig, "export": ExportConfig}
PROCESSES = re.compile(r"^# Processes: (\d+)\.")
# Keys that change no trained weight, or only with another key that the preset leaves off (LoRA, folds, KL target).
NO_TRAINING = {
    "output_dir", "on_bad_rows", "report_to", "save_total_limit", "logging_steps", "transcript_iterations",
    "gradient_accumulation_steps", "reward_retries", "reward_timeout", "num_folds", "lora_r", "lora_alpha",
    "kl_horizon", "importance_weight_level", "validation_prompts", "eval_iterations", "vllm_gpu_memory_utilization",
}  # fmt: skip
SELECTION = {"selection_prompts", "max_new_tokens", "temperature"}  # SFT's, with a reward model
CITED = re.compile(r"# .*(App\. [A-F]|[Ss]ection \d|Table \d|Eq\. \d|not in the paper)")


def files(preset: str) -> dict[str, Path]:
    return {path.stem: path for path in sorted((ROOT / "configs" / preset).glob("*.yaml"))}


def load(preset: str, name: str):
    stage = STAGES.get(name) or STAGES.get(name.split("-")[0], "")
    return parse(OTHERS.get(name) or getattr(configs, stage), ["--config", str(files(preset)[name]), "--run", "RUN"])


def stages(preset: str) -> dict:
    return {name: load(preset, name) for name in files(preset) if name != "world"}


def paths(config) -> list[str]:
    """Every value of a config that may name a file or a model."""
    found = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name.endswith(("_path", "_file", "_or_path")) and value:
            found.append(value)
    return found + [term.model for term in getattr(config, "reward", ())]


@pytest.mark.parametrize("preset", NAMES)
def test_a_stage_reads_what_another_one_writes(preset):
    found = stages(preset)
    written = {config.output_dir for config in found.values()}
    for name, config in found.items():
        for path in paths(config) if name not in OTHERS else ():
            if not path.startswith("RUN/") or path.startswith(("RUN/data/", "RUN/rm-folds", "RUN/ppo-plain")):
                continue
            parent = "/".join(path.split("/")[:2])
            own_models = preset == "instructgpt-175b" and parent in ("RUN/base", "RUN/base-6b")
            assert parent in written or own_models, f"{preset}/{name}: {path} is written by no stage"
    policy, reward = found["ppo"].model_name_or_path, found["ppo"].reward[0].model
    assert policy == found["sft"].output_dir and reward == found["rm"].output_dir
    assert found["rm"].model_name_or_path in {c.output_dir for n, c in found.items() if n.startswith("sft")}
    assert found["evaluate"].preset == preset and found["evaluate"].reward_model_path == reward
    assert found["evaluate"].ppo_ptx_path == "RUN/ppo" or found["evaluate"].ppo_path == "RUN/ppo"
    assert found["evaluate"].temperature == found["ppo"].temperature


@pytest.mark.parametrize("preset", [name for name in NAMES if (ROOT / "configs" / name / "data.yaml").exists()])
def test_data_files_are_those_that_the_preset_prepares(preset):
    found = stages(preset)
    data = found.pop("data")
    prepared = {f"RUN/data/{name}{suffix}.jsonl" for name in data.outputs for suffix in ("", "_validation")}
    for name, config in found.items():
        for path in paths(config) if name not in OTHERS else ():
            assert not path.startswith("RUN/data/") or path in prepared, f"{preset}/{name}: {path}"
    trained_on = [found["sft"].train_file, found["rm"].train_file, found["ppo"].train_file]
    assert not [path for path in trained_on if path.endswith("_validation.jsonl")]
    assert "hh-rlhf" not in str(data.outputs["demonstrations"])  # preference data is not for SFT


@pytest.mark.parametrize("preset", CLUSTER)
def test_batches_divide_for_the_processes_that_the_file_names(preset):
    for name, path in files(preset).items():
        if name == "data":
            continue
        match = PROCESSES.match(path.read_text(encoding="utf-8"))
        assert match, f"{path}: its first line says `# Processes: N.`"
        if name == "ppo":
            algebra = BatchAlgebra.of(load(preset, name), int(match[1]))
            assert algebra.iterations * algebra.rollout == load(preset, name).total_episodes


@pytest.mark.parametrize(
    ("preset", "name", "rows"),
    [
        ("tldr-pythia-1b", "sft", 128), ("tldr-pythia-1b", "rm", 64), ("hh-llama-8b", "sft", 128),
        ("hh-llama-8b", "rm", 64), ("instructgpt-175b", "sft", 8), ("instructgpt-175b", "sft-baseline", 8),
        ("instructgpt-175b", "sft-6b", 32), ("instructgpt-175b", "rm", 64),
    ],
)  # fmt: skip
def test_rows_a_step_over_all_processes(preset, name, rows):
    config = load(preset, name)
    processes = int(PROCESSES.match(files(preset)[name].read_text(encoding="utf-8"))[1])
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps * processes == rows


@pytest.mark.parametrize("preset", CLUSTER)
def test_hub_ids_are_names_alone(preset):
    for name, config in stages(preset).items():
        for path in paths(config) if name not in OTHERS else ():
            if not path.startswith(("RUN/", "configs/")):
                assert HUB_ID.fullmatch(path), f"{preset}/{name}: {path}"
            if path.startswith("configs/"):
                assert (ROOT / path).is_file()


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "instructgpt-175b").glob("*.yaml")), ids=lambda p: p.name)
def test_every_value_of_the_paper_cites_its_place(path):
    skip = ("output_dir", "preset", "run_dir", "  - model")
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith(("#", *skip)):
            assert CITED.search(line), f"{path.name}: {line!r} cites no table, section or appendix"


@pytest.mark.parametrize("name", ["sft", "sft-6b", "sft-baseline", "rm", "ppo"])
def test_every_training_value_in_force_is_named(name):
    """A default of ours that the paper does not give must not pass as the paper's."""
    config, text = load("instructgpt-175b", name), files("instructgpt-175b")[name].read_text(encoding="utf-8")
    off = NO_TRAINING | (SELECTION if name in ("sft", "sft-6b") else set())
    in_force = {
        field.name
        for field in dataclasses.fields(config)
        if getattr(config, field.name) not in (None, False, 0, "", ())
    }
    assert {"learning_rate", "adam_epsilon", "max_grad_norm"} <= in_force
    assert sorted(key for key in in_force - off if f"\n{key}:" not in text) == []


def test_the_papers_numbers():
    """Ouyang et al. 2022: section 3.5, Eq. 2, App. C."""
    sft, baseline, rm, ppo = (load("instructgpt-175b", name) for name in ("sft", "sft-baseline", "rm", "ppo"))
    assert (sft.num_train_epochs, sft.learning_rate, sft.pretraining_fraction) == (2, 2.45e-6, 0.1)
    assert (baseline.num_train_epochs, baseline.learning_rate, baseline.residual_dropout) == (16, 5.03e-6, 0.2)
    assert load("instructgpt-175b", "sft-6b").learning_rate == 1.04e-5
    assert (rm.num_train_epochs, rm.learning_rate, rm.batch_element) == (1, 9e-6, "ranking")
    assert (ppo.total_episodes, ppo.rollout_batch_size, ppo.num_mini_batches, ppo.num_ppo_epochs) == (
        256_000,
        512,
        8,
        1,
    )
    assert (ppo.ptx_coef, ppo.ptx_examples_per_episode, ppo.kl_coef, ppo.ema_decay) == (27.8, 8, 0.02, 0.992)
    assert (ppo.temperature, ppo.gamma, ppo.cliprange, ppo.warmup_iterations) == (1.0, 1.0, 0.2, 10)
    assert (ppo.max_prompt_length, ppo.max_new_tokens, ppo.value_learning_rate) == (1024, 1024, 5e-6)
    assert 2.55e-6 <= ppo.learning_rate <= 3.74e-6  # App. E.9: the two tried
