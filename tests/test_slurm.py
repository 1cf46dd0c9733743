"""configs/slurm/stage.slurm, started by stand-ins for Slurm's commands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "configs" / "slurm" / "stage.slurm"
FSDP = {  # key of configs/accelerate/fsdp2.yaml -> what accelerate's launcher makes of it
    "fsdp_version": "FSDP_VERSION", "fsdp_auto_wrap_policy": "FSDP_AUTO_WRAP_POLICY",
    "fsdp_reshard_after_forward": "FSDP_RESHARD_AFTER_FORWARD", "fsdp_state_dict_type": "FSDP_STATE_DICT_TYPE",
    "fsdp_cpu_ram_efficient_loading": "FSDP_CPU_RAM_EFFICIENT_LOADING",
    "fsdp_offload_params": "FSDP_OFFLOAD_PARAMS", "fsdp_activation_checkpointing": "FSDP_ACTIVATION_CHECKPOINTING",
}  # fmt: skip
SHOW = """#!/bin/bash
names="RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR ACCELERATE_USE_FSDP ${!FSDP_*}"
for name in $names; do echo "$name=${!name:-}"; done > "env-$RANK"
echo "$@" > "words-$RANK"
"""
REWARD = """
import os, pathlib, signal
def longer(prompts, completions, **_):
    told = pathlib.Path("told")
    if os.environ["RANK"] == "1" and not told.exists():
        told.touch()
        signal.raise_signal(signal.SIGTERM)
    return [float(len(text)) for text in completions]
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A folder with the script's `.venv`, and srun and scontrol on the path; gives what submits a job."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("srun", "scontrol"):
        text = f"#!{sys.executable}\n" + (ROOT / "tests" / "slurm_stand_in.py").read_text(encoding="utf-8")
        (commands / name).write_text(text, encoding="utf-8")
        (commands / name).chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_", "MASTER_"))]:
        monkeypatch.delenv(name)

    def submit(*words: str, **env: str) -> subprocess.CompletedProcess:
        slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node[1-1]", "PYTHONPATH": str(ROOT)}
        path = {"PATH": f"{commands}:{os.environ['PATH']}"}
        return subprocess.run(
            ["bash", str(SCRIPT), *words], cwd=tmp_path, env=os.environ | slurm | path | env, capture_output=True,
            text=True, timeout=300,
        )  # fmt: skip

    return submit


def put_python(folder: Path, text: str) -> None:
    python = folder / ".venv" / "bin" / "python"
    python.write_text(text, encoding="utf-8")
    python.chmod(0o755)


def environment(folder: Path, rank: int) -> dict[str, str]:
    return dict(line.split("=", 1) for line in (folder / f"env-{rank}").read_text().splitlines())


def test_each_task_is_a_process_that_shards_as_the_config_of_accelerate_says(cluster, tmp_path):
    put_python(tmp_path, SHOW)
    done = cluster("ppo", "mine", "--seed", "1")
    assert done.returncode == 0, done.stderr
    assert environment(tmp_path, 0)["ACCELERATE_USE_FSDP"] == "" and "FSDP_VERSION" not in environment(tmp_path, 0)
    assert cluster("ppo", "mine", "--seed", "1", SHARD="true").returncode == 0
    first, second = environment(tmp_path, 0), environment(tmp_path, 1)
    assert (first["RANK"], first["LOCAL_RANK"], second["RANK"], second["LOCAL_RANK"]) == ("0", "0", "1", "1")
    assert first["WORLD_SIZE"] == "2" and first["MASTER_ADDR"] == "127.0.0.1"
    config = yaml.safe_load((ROOT / "configs" / "accelerate" / "fsdp2.yaml").read_text(encoding="utf-8"))["fsdp_config"]
    wanted = {name: str(config[key]) for key, name in FSDP.items()}
    assert config.keys() == FSDP.keys() and first["ACCELERATE_USE_FSDP"] == "true"
    assert {name: first[name].lower() for name in wanted} == {name: value.lower() for name, value in wanted.items()}
    wanted = "-m stages ppo --config configs/mine/ppo.yaml --run runs/mine --resume_from_checkpoint latest --seed 1\n"
    assert (tmp_path / "words-1").read_text() == wanted


@pytest.mark.parametrize(
    ("words", "said"), [(["ppo"], "stage.slurm STAGE PRESET"), (["evaluate", "mine"], "for base, sft, rm and ppo")]
)
def test_a_job_with_wrong_words_says_which(cluster, words, said):
    done = cluster(*words)
    assert done.returncode != 0 and said in done.stderr


def test_a_job_in_which_a_task_fails_is_not_queued_again(cluster, tmp_path):
    """The other task ends by Slurm's signal, so that the job's status is the one of a saved checkpoint."""
    old = tmp_path / "runs" / "mine" / "ppo" / "checkpoint-1" / "complete.json"
    old.parent.mkdir(parents=True)
    old.touch()
    os.utime(old, (0, 0))
    put_python(tmp_path, "#!/bin/bash\n[[ $RANK == 1 ]] && exit 2\nexec sleep 60\n")
    done = cluster("ppo", "mine")
    assert done.returncode == 143 and not (tmp_path / "requeued").exists()


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.xdist_group("dist")
def test_a_job_at_its_end_saves_queues_again_and_goes_on(cluster, tmp_path, tiny_codec):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": None, "eos_token_id": tiny_codec.eos_id, "pad_token_id": tiny_codec.pad_id}
    vocabulary = len(tiny_codec.tokenizer)
    LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **sizes, **ends)).save_pretrained(tmp_path / "policy")
    tiny_codec.save(tmp_path / "policy")
    put_python(tmp_path, f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    (tmp_path / "mine.py").write_text(REWARD, encoding="utf-8")
    rows = [{"prompt": f"cow {i}"} for i in range(8)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "configs" / "mine").mkdir(parents=True)
    config = {
        "output_dir": "{run}/ppo", "model_name_or_path": "policy", "train_file": "prompts.jsonl",
        "reward": [{"function": "mine:longer"}], "bf16": False, "ptx_coef": 0, "total_episodes": 16,
        "rollout_batch_size": 8, "num_mini_batches": 1, "max_prompt_length": 16, "max_new_tokens": 4,
    }  # fmt: skip
    (tmp_path / "configs" / "mine" / "ppo.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    cpu = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ended = cluster("ppo", "mine", **cpu)
    assert ended.returncode == 143, ended.stderr[-3000:]
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"
    output = tmp_path / "runs" / "mine" / "ppo"
    assert (output / "checkpoint-1").is_dir() and not (output / "manifest.json").exists()
    again = cluster("ppo", "mine", **cpu)
    assert again.returncode == 0, again.stderr[-3000:]
    assert (output / "manifest.json").exists() and len((output / "metrics.jsonl").read_text().splitlines()) == 2
    assert len((tmp_path / "requeued").read_text().splitlines()) == 1
