"""Stage 1: demonstrations -> policy, by supervised fine-tuning (paper section 3.5, App. C.1 and C.3).

    minimise  - E_demonstrations[ sum_t log p(response_t | prompt, response_<t) ]     prompt tokens are not predicted

TRL's SFTTrainer drives it, its batches grouped by length. Of the paper: cosine to 10% of peak without warm-up, epochs
over one, a checkpoint each epoch, the final one chosen by reward where a reward model is given, an optional share of
pretraining text (C.3). Differs: prompt masking is not stated in the paper; here it is on by default.

    python -m stages.sft --config configs/tiny/sft.yaml --run runs/tiny
    accelerate launch --config_file configs/accelerate/multi_gpu.yaml -m stages.sft --config ...
"""

import sys
from pathlib import Path

import trl
from datasets import Dataset
from transformers import set_seed

from align.checkpoint import is_finished
from align.config import SFTConfig
from align.data import load_demonstrations, load_texts
from align.demonstrations import demonstration_rows, every_answer, mix_pretraining
from align.files import atomic_contents
from align.interrupt import deferred
from align.lora import with_lora
from align.manifest import check_parent, write_manifest
from align.models import add_residual_dropout, load_policy, refuse_adapter, row_limit, save_chosen
from align.optimise import trainer_optim
from align.parse import parse
from align.resume import start_run
from align.reward_models import reward_config
from align.runtime import is_main_process, tune_cpu
from align.select import choose_epoch, selection_prompts
from align.splits import keep_apart, refuse_eval_only
from align.text import Codec
from align.track import announce
from align.trainer import (
    DemonstrationTrainer,
    OwnDropout,
    SaveEachEpoch,
    causal_collator,
    common_arguments,
    metrics_callback,
    rate_arguments,
    refuse_several_gpus,
    resume_argument,
)
from stages.__main__ import run


def main(argv: list[str]) -> None:
    # 1. Config, parents, data, folder.
    config = parse(SFTConfig, argv)
    if is_finished(config.output_dir, config.resume_from_checkpoint):
        return
    tune_cpu()
    refuse_several_gpus()
    parents = [check_parent(config.model_name_or_path, "model_name_or_path", ("base", "sft"))]
    if config.use_peft:
        refuse_adapter(config.model_name_or_path)
    codec = Codec.load(config.model_name_or_path, config.chat_template_path)
    train, validation, reports = load_rows(config, codec)
    prompts = []
    if config.reward_model_path:
        parents.append(check_parent(config.reward_model_path, "reward_model_path", ("rm",)))
        reward_config(config.reward_model_path, "reward_model_path")
        prompts = selection_prompts(config.model_name_or_path, config, codec)
    output, checkpoint = start_run(config, parents[:1], reports)  # a reward model only chooses the epoch
    set_seed(config.seed)

    # 2. The policy, with dropout on the residual stream in training mode only.
    policy = load_policy(config.model_name_or_path, config.attn_implementation)
    collator = causal_collator(policy, config.attn_implementation, codec.pad_id)
    if config.use_peft:
        policy = with_lora(policy, config)
    if config.residual_dropout > 0:  # on what a layer and its adapter write together
        add_residual_dropout(policy, config.residual_dropout)

    # 3. Train.
    trainer = DemonstrationTrainer(
        model=policy,
        config=config,
        args=training_arguments(config, output),
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(validation),
        data_collator=collator,
        processing_class=codec.tokenizer,
        callbacks=[metrics_callback(config, output, checkpoint), SaveEachEpoch(), OwnDropout()],
    )
    trainer.train(resume_from_checkpoint=resume_argument(checkpoint))

    # 4. Choose the epoch: best mean reward of sampled responses, else lowest validation loss.
    device, autocast, log = trainer.args.device, trainer.accelerator.autocast, trainer.state.log_history
    del policy
    trainer.let_go()
    choice = choose_epoch(output, log, prompts, config, codec, device, autocast)
    announce(f"chose {choice['checkpoint']} by {choice['criterion']}")

    # 5. Save: a HuggingFace folder (LoRA merged, its adapter beside it), the manifest last.
    if is_main_process():
        with deferred("the results are written first"), atomic_contents(output) as folder:
            save_chosen(output / choice["checkpoint"], folder)
            codec.save(folder)
            write_manifest(folder, "sft", config, config.seed, parents, reports, {"selection": choice})
    announce(f"policy in {output}; next: make collect, make rm")


def load_rows(config: SFTConfig, codec: Codec) -> tuple[list[dict], list[dict], dict]:
    """Training rows (with their share of pretraining text), validation rows, and what was read and dropped."""
    held_out, held_out_report = load_demonstrations(config.validation_file, config.on_bad_rows)
    demonstrations, report = load_demonstrations(config.train_file, config.on_bad_rows)
    refuse_eval_only(demonstrations, report)
    demonstrations, report = keep_apart(demonstrations, report, held_out, config.on_bad_rows)
    if config.all_answers:  # conversations that differ may begin alike
        held_out, held_out_report = every_answer(held_out, held_out_report)
        demonstrations, report = keep_apart(*every_answer(demonstrations, report), held_out, "drop")
    limit = row_limit(config.model_name_or_path, "max_length", config.max_length)
    train, report = demonstration_rows(demonstrations, codec, limit, report)
    validation, held_out_report = demonstration_rows(held_out, codec, limit, held_out_report)
    reports = {"train_file": report, "validation_file": held_out_report}
    if config.pretraining_fraction > 0:
        texts, reports["pretraining_file"] = load_texts(config.pretraining_file, config.on_bad_rows)
        train = mix_pretraining(train, texts, config.pretraining_fraction, codec, limit, config.seed)
    return train, validation, reports


def training_arguments(config: SFTConfig, output: Path) -> trl.SFTConfig:
    return trl.SFTConfig(
        **common_arguments(config, output),
        **rate_arguments(config),
        max_length=config.max_length,
        completion_only_loss=config.completion_only_loss,
        num_train_epochs=config.num_train_epochs,
        per_device_train_batch_size=config.per_device_train_batch_size,
        per_device_eval_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        optim=trainer_optim(config),
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_epsilon=config.adam_epsilon,
        max_grad_norm=config.max_grad_norm,
        eval_strategy="epoch",
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 500,
        activation_checkpointing=config.gradient_checkpointing,  # its name from transformers 6 on
    )


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
