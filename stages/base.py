"""Stage 0: text -> a small Llama and its byte-level BPE tokenizer, from scratch.

    minimise  - sum over tokens of log p(token | tokens before it) / number of tokens

The embedded stand-in for a pretrained model, so that the pipeline can be watched whole on a CPU. With any other preset
a model path or hub id takes its place. One document is one row: nothing unrelated stands in its context.

    python -m stages.base --config configs/tiny/base.yaml --run runs/tiny
"""

import sys
from pathlib import Path

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments, set_seed

from align.checkpoint import is_finished
from align.config import BaseConfig
from align.data import load_texts
from align.files import atomic_contents
from align.initialise import embedding_std, start_with_circuits
from align.interrupt import deferred
from align.manifest import write_manifest
from align.optimise import MuonAdamW
from align.parse import parse
from align.resume import start_run
from align.runtime import is_main_process, tune_cpu
from align.text import Codec
from align.track import announce
from align.trainer import (
    LanguageModelTrainer,
    causal_collator,
    common_arguments,
    metrics_callback,
    refuse_several_gpus,
    resume_argument,
)
from stages.__main__ import run

# One user message and its answer, as in "<bos>instruction\nanswer<eos>".
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
)


def main(argv: list[str]) -> None:
    # 1. Config, data, folder.
    config = parse(BaseConfig, argv)
    if is_finished(config.output_dir, config.resume_from_checkpoint):
        return
    tune_cpu()
    refuse_several_gpus()
    texts, text_report = load_texts(config.train_file, config.on_bad_rows)
    held_out, held_out_report = load_texts(config.validation_file, config.on_bad_rows)
    output, checkpoint = start_run(config, [], {"train_file": text_report})
    set_seed(config.seed)

    # 2. Tokenizer: byte-level, so any text survives a round trip; pad and EOS are tokens of their own.
    codec = Codec(train_tokenizer(texts, config.vocab_size))
    rows = Dataset.from_dict({"input_ids": codec.documents(texts)})
    validation = Dataset.from_dict({"input_ids": codec.documents(held_out)})

    # 3. Model, and training with rows of like length together.
    model = build_model(config, codec)
    trainer = LanguageModelTrainer(
        model=model,
        optimizers=(muon(model, config), None),
        args=training_arguments(config, output),
        train_dataset=rows,
        eval_dataset=validation,
        data_collator=causal_collator(model, config.attn_implementation, codec.pad_id),
        callbacks=[metrics_callback(config, output, checkpoint)],
    )
    trainer.train(resume_from_checkpoint=resume_argument(checkpoint))
    loss = trainer.evaluate()["eval_loss"]

    # 4. Save: a HuggingFace folder, its manifest last.
    if is_main_process():
        data = {"train_file": text_report, "validation_file": held_out_report}
        with deferred("the results are written first"), atomic_contents(output) as folder:
            trainer.model.save_pretrained(folder)
            codec.save(folder)
            write_manifest(folder, "base", config, config.seed, data=data, metrics={"validation_loss": loss})
    announce(f"base model in {output} (validation loss {loss:.3f} a token); next: make sft")


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<pad>", "<eos>", "<bos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = ("<bos>", tokenizer.token_to_id("<bos>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[bos])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")
    fast.chat_template = TEMPLATE
    fast.clean_up_tokenization_spaces = False
    return fast


def build_model(config: BaseConfig, codec: Codec) -> LlamaForCausalLM:
    model = LlamaForCausalLM(llama_config(config, codec))
    start_with_circuits(model)
    return model


def llama_config(config: BaseConfig, codec: Codec) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(codec.tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=True,
        attention_bias=True,
        initializer_range=embedding_std(config.hidden_size),
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},  # documents are short
        bos_token_id=codec.tokenizer.bos_token_id,
        eos_token_id=codec.eos_id,
        pad_token_id=codec.pad_id,
        attn_implementation=config.attn_implementation,
    )


def muon(model: LlamaForCausalLM, config: BaseConfig) -> MuonAdamW:
    betas = 0.9, config.adam_beta2
    return MuonAdamW(model, config.muon_learning_rate, config.learning_rate, betas, bf16=config.bf16)


def training_arguments(config: BaseConfig, output: Path) -> TrainingArguments:
    return TrainingArguments(
        **common_arguments(config, output),
        per_device_train_batch_size=config.per_device_train_batch_size,
        per_device_eval_batch_size=128,
        max_steps=config.max_steps,
        learning_rate=config.learning_rate,
        max_grad_norm=config.max_grad_norm,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": config.decay_steps, "decay_type": "linear"},
        warmup_steps=config.warmup_steps,
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 500,
    )


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
