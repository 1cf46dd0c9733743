"""Stage 2: rankings -> reward model (paper section 3.5, Eq. 1, App. C.2).

    minimise  - E_prompts[ 1 / C(K, 2) * sum over pairs of log sigmoid(r(x, better) - r(x, worse)) ]

All pairs of a prompt are one batch element and K forward rows; ties carry no gradient; one epoch; then a bias makes
demonstrations score 0 on average and is stored in the head. transformers' Trainer drives it.
Differs: starts from the SFT model's body (the paper's final RM starts from a GPT-3 tuned on public tasks, and reports
that SFT starts gave similar results).

    python -m stages.rm --config configs/tiny/rm.yaml --run runs/tiny
    accelerate launch --config_file configs/accelerate/multi_gpu.yaml -m stages.rm --config ...

Cross-validation by labeler (section 4.1) or source trains a model a fold, reports, and keeps no model:

    python -m stages.rm --config configs/tiny/rm.yaml --run runs/tiny --folds_by labeler --output_dir runs/tiny/rm-folds
"""

import gc
import sys
from dataclasses import replace
from pathlib import Path

from transformers import TrainingArguments, set_seed

from align.checkpoint import checkpoints, is_finished, start_output
from align.config import RMConfig
from align.data import load_demonstrations, load_rankings
from align.evaluate.folds import make_folds, refuse_model, summarise_folds
from align.evaluate.reward_report import ranking_accuracy
from align.files import atomic_contents, plain, remove_folders, write_json
from align.head import fit_head
from align.interrupt import deferred
from align.lengths import demonstration_lengths, drop_long, ranking_lengths
from align.lora import with_lora
from align.manifest import check_parent, write_manifest
from align.models import ScalarModel, disable_dropout, load_scalar_model, refuse_adapter, row_limit, save_scalar_model
from align.optimise import trainer_optim
from align.parse import parse
from align.ranking import RankingCollator, encode_rankings, normalise_on, score_rankings, split_pairs
from align.resume import start_run
from align.runtime import is_main_process, refuse_sharding, tune_cpu
from align.splits import keep_apart, refuse_eval_only
from align.text import Codec
from align.track import announce
from align.trainer import (
    PairTrainer,
    RankingTrainer,
    common_arguments,
    metrics_callback,
    rate_arguments,
    refuse_several_gpus,
    resume_argument,
)
from align.validate import say_training_leaks
from stages.__main__ import run


def main(argv: list[str]) -> None:
    # 1. Config, parent, data, folder.
    config = parse(RMConfig, argv)
    if is_finished(config.output_dir, config.resume_from_checkpoint):
        return
    tune_cpu()
    refuse_several_gpus()
    parents = [check_parent(config.model_name_or_path, "model_name_or_path", ("sft", "base", "ppo"))]
    refuse_adapter(config.model_name_or_path, "merge it into its base first")
    codec = Codec.load(config.model_name_or_path)
    limit = row_limit(config.model_name_or_path, "max_length", config.max_length)
    rankings, held, reports = load_all(config, codec, limit)
    if config.folds_by:
        return cross_validate(config, codec, rankings, held, parents, reports)
    demonstrations = []
    if config.demonstrations_file is not None:
        demonstrations, report = load_demonstrations(config.demonstrations_file, config.on_bad_rows)
        demonstrations, report = drop_long(demonstrations, codec, limit, report, demonstration_lengths)
        reports["demonstrations_file"] = report
    output, checkpoint = start_run(config, parents, reports)

    # 2. Train: each prompt once an epoch, its pairs never apart.
    model = train(config, codec, rankings, held["validation"], output, checkpoint)

    # 3. Normalise, in float32: demonstrations score 0 on average.
    means = normalise_on(model, demonstrations, codec, config.per_device_eval_batch_size)

    # 4. Report on prompts, customers and labelers that training never saw; save, the manifest last.
    metrics = accuracies(model, held, codec, config) | means
    if is_main_process():
        own_pad = codec.with_own_pad()  # for who loads it with transformers alone
        with deferred("the results are written first"), atomic_contents(output) as folder:
            save_scalar_model(model, folder, own_pad.pad_id)
            own_pad.save(folder)
            validation = metrics["validation"]
            write_json(folder / "report.json", validation | {k: v for k, v in metrics.items() if k != "validation"})
            write_manifest(folder, "rm", config, config.seed, parents, reports, metrics)
        remove_folders(*(() if config.save_steps else checkpoints(output)))  # of the last step, or of a signal
        announce(f"held-out accuracy {metrics['validation']['accuracy']['mean']:.3f}")
    announce(f"reward model in {output}; next: make ppo")


def train(
    config: RMConfig, codec: Codec, rankings: list, validation: list, output: Path, checkpoint: Path | None
) -> ScalarModel:
    """The language model's body with a fresh scalar head and no dropout, trained on `rankings`."""
    set_seed(config.seed)
    model = load_scalar_model(config.model_name_or_path, config.attn_implementation, fresh_head=True)
    disable_dropout(model)
    if config.use_peft:
        model.model = with_lora(model.model, config)
    if config.gradient_checkpointing:
        model.checkpoint_activations()
    elements, pairs = encode_rankings(rankings, codec), config.batch_element == "pair"
    trainer = (PairTrainer if pairs else RankingTrainer)(
        model=model,
        config=config,
        args=training_arguments(config, output),
        train_dataset=split_pairs(elements) if pairs else elements,
        eval_dataset=encode_rankings(validation, codec) if config.eval_steps else None,
        data_collator=RankingCollator(codec.pad_id),
        callbacks=[metrics_callback(config, output, checkpoint)],
    )
    if config.head_init == "fitted" and checkpoint is None:
        size = config.per_device_eval_batch_size
        found = fit_head(trainer.model, elements, codec.pad_id, size, trainer.accelerator.autocast)
        announce(f"head fitted on the body as it is: {found['accuracy']:.3f} of the training pairs")
    trainer.train(resume_from_checkpoint=resume_argument(checkpoint))
    return trainer.finished_model()


def cross_validate(config: RMConfig, codec: Codec, rankings: list, held: dict, parents: list, reports: dict) -> None:
    """A model for each group of labelers or sources left out, tested on prompts that it did not learn from."""
    refuse_model(config.output_dir)
    folds = make_folds(rankings, held["validation"], config.folds_by, config.num_folds)
    output = start_output(config.output_dir, config.overwrite_output_dir, config.resume_from_checkpoint)
    scored = []
    for i, fold in enumerate(folds):
        announce(
            f"fold {i + 1} of {len(folds)}: {len(fold.train)} rankings to learn from, {len(fold.held_out)} held out"
        )
        folder, checkpoint = start_run(replace(config, output_dir=str(output / f"fold-{i + 1}")), parents, reports)
        model = train(config, codec, fold.train, held["validation"], folder, checkpoint)
        tests = {"in_group": fold.in_group, "held_out": fold.held_out}
        size = config.per_device_eval_batch_size
        scored.append({name: score_rankings(model, rows, codec, size) for name, rows in tests.items()})
        del model
        gc.collect()  # its Trainer, with the optimiser's state, is in a circle of references
    if is_main_process():
        metrics = plain(summarise_folds(folds, scored, config.folds_by, config.seed))
        with atomic_contents(output) as folder:
            write_json(folder / "folds.json", metrics)
            write_manifest(folder, "rm_folds", config, config.seed, parents, reports, metrics)
    announce(f"accuracy in and out of group in {output / 'folds.json'}")


def load_all(config: RMConfig, codec: Codec, limit: int) -> tuple[list, dict[str, list], dict]:
    """Training rankings, held-out rankings by name, and what was read and dropped."""
    if config.head_init == "fitted":
        refuse_sharding("head_init: fitted", "normal")
    held, reports = {}, {}
    for name, path in (("validation", config.validation_file), ("held_out_labelers", config.held_out_file)):
        if path:
            held[name], report = load_rankings(path, config.on_bad_rows)
            held[name], reports[name] = drop_long(held[name], codec, limit, report, ranking_lengths)
    rankings, report = load_rankings(config.train_file, config.on_bad_rows)
    refuse_eval_only(rankings, report)
    for others in held.values():
        rankings, report = keep_apart(rankings, report, others, config.on_bad_rows)
    rankings, reports["train_file"] = drop_long(rankings, codec, limit, report, ranking_lengths)
    say_training_leaks([config.model_name_or_path], [ranking for others in held.values() for ranking in others])
    return rankings, held, reports


def accuracies(model, held: dict[str, list], codec: Codec, config: RMConfig) -> dict:
    """Accuracy with intervals, calibration and baselines, by name of the held-out set."""
    found = {name: score_rankings(model, rows, codec, config.per_device_eval_batch_size) for name, rows in held.items()}
    return {name: plain(ranking_accuracy(rows, config.seed)) for name, rows in found.items()}


def training_arguments(config: RMConfig, output: Path) -> TrainingArguments:
    return TrainingArguments(
        **common_arguments(config, output),
        **rate_arguments(config),
        num_train_epochs=config.num_train_epochs,
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        optim=trainer_optim(config),
        eval_strategy="steps" if config.eval_steps else "no",
        eval_steps=config.eval_steps or None,
        per_device_eval_batch_size=config.per_device_eval_batch_size,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_epsilon=config.adam_epsilon,
        max_grad_norm=config.max_grad_norm,
        save_strategy="no" if config.folds_by and not config.save_steps else "steps",
        save_steps=config.save_steps or 10**9,  # after the last one alone: if scoring fails, the training is kept
    )


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
