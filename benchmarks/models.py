"""Small Llamas with random weights, as folders that both sides load. Their tokenizer is preset tiny's kind."""

from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from align.config import BaseConfig
from align.files import atomic_folder
from align.models import load_scalar_model, save_scalar_model
from align.text import Codec
from benchmarks import workloads
from data.world.text import write_text
from stages.base import llama_config, train_tokenizer

CONTEXT = 8192  # real prompts in 1024 tokens' vocabulary are long
TOKENS = 1024  # the tokenizer's, whatever the model's vocabulary is: random queries need none


def make_model(name: str, folder: Path) -> None:
    """Write `workloads.MODELS[name]`, whole or not at all; a folder that exists is kept."""
    if (folder / "config.json").exists():
        return
    sizes = workloads.MODELS[name]
    config = BaseConfig(output_dir=str(folder), max_position_embeddings=CONTEXT, **sizes)
    codec = Codec(train_tokenizer(list(write_text(0, "text", 4000, frozenset())), TOKENS))
    llama = llama_config(config, codec)
    llama.vocab_size = sizes["vocab_size"]
    torch.manual_seed(0)
    with atomic_folder(folder) as partial:
        LlamaForCausalLM(llama).save_pretrained(partial)
        codec.save(partial)


def reward_folder(model: Path, codec: Codec) -> str:
    """A reward model's folder beside the model's: its body with a fresh head."""
    folder = model.with_name(f"{model.name}-reward")
    if not (folder / "config.json").exists():
        with atomic_folder(folder) as partial:
            save_scalar_model(load_scalar_model(str(model), fresh_head=True), partial, codec.pad_id)
            codec.save(partial)
    return str(folder)
