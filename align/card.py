"""A model card for the folder that a stage leaves: what it is, how to load it, what it was made from."""

import json
from typing import Any

import yaml
from huggingface_hub import ModelCardData

KINDS = {
    "base": ("Base language model", "trained from scratch on the embedded world's text"),
    "sft": ("Supervised policy", "trained on demonstrations (InstructGPT, section 3.5, stage 1)"),
    "rm": ("Reward model", "trained on rankings (InstructGPT, Eq. 1)"),
    "ppo": ("PPO policy", "trained against a reward model (InstructGPT, Eq. 2)"),
}
LOAD = """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
if tokenizer.chat_template is None:
    inputs = tokenizer(prompt, return_tensors="pt")
else:
    messages = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
tokens = model.generate(**inputs, max_new_tokens=256)[0, inputs["input_ids"].shape[1] :]
answer = tokenizer.decode(tokens, skip_special_tokens=True)"""
LOAD_REWARD = """from glob import glob
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

# of a model on the hub: folder = huggingface_hub.snapshot_download("ORG/NAME")
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder).eval()  # has no place for the bias
bias = next(part["score.bias"] for part in map(load_file, glob(f"{folder}/*.safetensors")) if "score.bias" in part)

# It reads the prompt as a policy does, the answer, and EOS: nothing of what a chat template writes after it.
messages, chat = [{"role": "user", "content": prompt}], tokenizer.chat_template is not None
query = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) if chat else prompt
ids = tokenizer(query, add_special_tokens=not chat)["input_ids"]
ids += tokenizer(answer + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
reward = model(torch.tensor([ids])).logits[:, 0] + bias"""


def model_card(manifest: dict[str, Any]) -> str:
    """Markdown with the hub's front matter, from the fields of a manifest (`align.manifest.Manifest`)."""
    stage = manifest["stage"]
    title, what = KINDS.get(stage, (stage, "made by this stage"))
    reward = stage == "rm"
    task = "text-classification" if reward else "text-generation"
    what += "; demonstrations score 0 on average" if "demonstration_mean" in manifest["metrics"] else ""
    start = [p["path"] for p in manifest["parents"] if p["role"] == "model_name_or_path" and not p["weights_sha256"]]
    front = ModelCardData(
        library_name="transformers", pipeline_tag=task, tags=["align", "rlhf", stage],
        base_model=start[0] if start else None,
    ).to_yaml()  # fmt: skip
    settings = yaml.safe_dump(manifest["config"], sort_keys=False, allow_unicode=True).strip()
    parts = [
        f"---\n{front}\n---",
        f"# {title}",
        f"{what[0].upper()}{what[1:]}. Seed {manifest['seed']}; `manifest.json` has hashes and versions.",
        f"```python\n{LOAD_REWARD if reward else LOAD}\n```",
        *_bullets("Made from", [(p["role"], p["path"], (p["weights_sha256"] or "")[:12]) for p in manifest["parents"]]),
        *_bullets("Data", [_data_row(name, report) for name, report in manifest["data"].items()]),
        *_bullets("Numbers", _numbers(manifest["metrics"])),
        f"## Settings\n\n```yaml\n{settings}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _numbers(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """What is one number, and the accuracies with their intervals."""
    rows = []
    for name, value in metrics.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            rows.append((name, f"{value:.4g}"))
        elif isinstance(value, dict) and isinstance(value.get("accuracy"), dict):
            mean, low, high = (value["accuracy"][key] for key in ("mean", "low", "high"))
            known = None not in (mean, low, high)  # a manifest holds null where nothing could be compared
            rows.append((f"{name} accuracy", f"{mean:.3f} [{low:.3f}, {high:.3f}]" if known else "no pair to compare"))
    return rows


def _data_row(name: str, report: dict[str, Any]) -> tuple[Any, ...]:
    dropped = json.dumps(report["dropped"]) if report.get("dropped") else "none"
    return name, f"{report.get('rows_used')} rows", f"dropped: {dropped}"


def _bullets(title: str, rows: list[tuple[Any, ...]]) -> list[str]:
    """A heading and a bullet a row, or nothing."""
    lines = [f"- {row[0]}: " + ", ".join(str(cell) for cell in row[1:] if cell != "") for row in rows]
    return [f"## {title}", "\n".join(lines)] if lines else []
