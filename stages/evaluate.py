"""Checkpoints -> numbers with intervals (paper section 3.6): is PPO better than SFT, and what did it cost?

    every policy answers the same held-out prompts, sampled and greedy; a judge scores each answer;
    win rate and paired gain against SFT with 95% intervals; KL to SFT, perplexity on plain text, length, share finished
    with `best_of` SFT answers n times: what its best by the reward model scores, and at which KL (Gao et al. 2022)

Without a judge the reward model compares: what PPO climbed, so a gain there shows that it climbed, not that answers are
better. Read the transcripts.

Policies: base, base with a few-shot prefix ("prompted"), SFT, PPO and PPO-ptx where they were trained.

    python -m stages.evaluate --config configs/tiny/evaluate.yaml --run runs/tiny
"""

import sys
from pathlib import Path
from typing import Any

from align.checkpoint import start_output
from align.config import EvaluateConfig
from align.data import load_demonstrations, load_prompts, load_rankings, load_texts
from align.errors import UserError
from align.evaluate.best_of_n import best_of_report
from align.evaluate.policies import (
    Setting,
    answer,
    answer_n,
    few_shot_examples,
    judged,
    load_evaluated,
    load_proxy,
    perplexity,
    policy_paths,
    scored,
)
from align.evaluate.report import pick_transcripts, write_plots, write_report
from align.evaluate.reward_report import gold_accuracy, ranking_accuracy
from align.evaluate.summary import by_reward_model, summarise
from align.evaluate.win_rate import agreement
from align.files import plain, write_json, write_jsonl
from align.judge import Judge
from align.lengths import Lengths, drop_long, prompt_lengths, ranking_lengths
from align.manifest import check_parent, read_manifest
from align.models import context_of
from align.order import evenly
from align.parse import parse
from align.reward_models import reads_sampled_tokens
from align.rows import DataReport
from align.runtime import Runtime, is_main_process, tune_cpu
from align.text import Codec
from align.track import announce, read_jsonl
from align.types import Ranking
from align.validate import say_training_leaks
from stages.__main__ import run, seconds_so_far


def main(argv: list[str]) -> None:
    # 1. Config, checkpoints, prompts, judge.
    config = parse(EvaluateConfig, argv)
    tune_cpu()
    check_parent(config.sft_path, "sft_path", ("sft",))
    codec = Codec.load(config.sft_path)
    paths = policy_paths(config, codec)
    say_other_temperatures(paths, config.temperature)
    if not config.reward_function:
        check_parent(config.reward_model_path, "reward_model_path", ("rm",))
    room = context_of(config.sft_path) or sys.maxsize
    if room <= config.max_new_tokens + 1:
        raise UserError(f"max_new_tokens: {config.max_new_tokens} leaves a prompt no room in {room} tokens; lower it")
    prompts = within(room - config.max_new_tokens - 1, codec, *load_prompts(config.prompts_file, config.on_bad_rows))
    if len(prompts) < 2:
        raise UserError(f"prompts_file: {len(prompts)} prompt that can be used; an interval needs 2 or more")
    prompts = evenly(prompts, config.num_prompts)
    rankings, documents = held_out_rankings(config, codec, room), []
    models = [*paths.values(), config.reward_model_path or None]
    say_training_leaks(models, [*prompts, *rankings])
    if config.text_file:
        documents = [ids[:room] for ids in codec.documents(load_texts(config.text_file, config.on_bad_rows)[0])]
    output = start_output(config.output_dir, config.overwrite_output_dir)
    runtime = Runtime(config.seed, config.bf16)
    sft, reward = load_evaluated(config.sft_path, config, runtime), load_proxy(config, codec, runtime)
    judge = Judge(config.judge) if config.judge else None
    setting = Setting(
        codec, prompts, sft, reward, judge, config.max_new_tokens, config.per_device_batch_size, config.seed, room
    )

    # 2. Every policy answers every prompt, sampled and greedy.
    measured: dict[str, Any] = {name: None for name in ("base", "prompted", "sft", "ppo", "ppo_ptx")}
    for name, path, examples in lineup(paths, config):
        announce(f"evaluating {name}")
        policy = None  # one beside SFT at a time
        policy = sft if name == "sft" else load_evaluated(path, config, runtime)
        measured[name] = {
            "sampled": answer(policy, setting, config.temperature, runtime, examples),
            "greedy": answer(policy, setting, 0.0, runtime, examples),
            "perplexity": perplexity(policy, documents, config.per_device_batch_size, runtime.device),
        }

    # 3. SFT's best of n beside PPO; the reward model against labelers and judge, and the labelers against each other.
    about = {"preset": config.preset, "temperature": config.temperature}
    evaluation = {**about, "policies": measured, **judges_report(config, setting, rankings)}
    evaluation["by_reward_model"] = by_reward_model(measured, config.seed)
    evaluation["step_zero"] = step_zero(config)
    evaluation["best_of_n"] = None
    if config.best_of:
        announce(f"evaluating sft's best of {config.best_of}")
        drawn = answer_n(sft, setting, config.best_of, config.temperature, runtime)
        evaluation["best_of_n"] = best_of_report(drawn, measured)
    evaluation["seconds"] = seconds_so_far(config.run_dir, "evaluate")
    evaluation["transcripts"] = pick_transcripts(evaluation, config.num_transcripts, config.seed)

    # 4. Write: evaluation.json, summary.json, plots, tables, transcripts.
    if is_main_process():
        write_all(output, evaluation, config)
    announce(f"report in {output / 'index.html'}, numbers in {Path(config.run_dir) / 'summary.json'}")


def held_out_rankings(config: EvaluateConfig, codec: Codec, room: int) -> list[Ranking]:
    """Those that SFT can read, and a reward model that reads its tokens; another cuts what it cannot."""
    if not config.rankings_file:
        return []
    if config.reward_model_path and reads_sampled_tokens(config.reward_model_path, codec):
        room = min(room, context_of(config.reward_model_path) or room)
    return within(room, codec, *load_rankings(config.rankings_file, config.on_bad_rows), ranking_lengths)


def within(max_tokens: int, codec: Codec, rows: list, report: DataReport, lengths: Lengths = prompt_lengths) -> list:
    """The rows that the models can read."""
    kept, report = drop_long(rows, codec, max_tokens, report, lengths)
    if len(kept) < len(rows):
        announce(
            f"{', '.join(report.paths)}: {len(rows) - len(kept)} of {len(rows)} rows over {max_tokens} tokens left out"
        )
    return kept


def say_other_temperatures(paths: dict[str, str | None], temperature: float) -> None:
    for path in filter(None, paths.values()):
        manifest = read_manifest(path)
        trained = manifest.config.get("temperature") if manifest and manifest.stage == "ppo" else None
        if trained not in (None, temperature):
            announce(
                f"temperature: {path} was trained on answers drawn at {trained:g}, these are drawn at {temperature:g}"
            )


def lineup(paths: dict[str, str | None], config: EvaluateConfig) -> list[tuple]:
    rows = [(name, path, []) for name, path in paths.items() if path]
    if config.few_shot_file and paths["base"]:
        examples = few_shot_examples(load_demonstrations(config.few_shot_file, config.on_bad_rows)[0])
        rows.insert(1, ("prompted", paths["base"], examples))
    return rows


def judges_report(config: EvaluateConfig, setting: Setting, rankings: list[Ranking]) -> dict[str, Any]:
    if not rankings:
        return {"rm": None, "labelers": {"agreement": None}}
    pairs = scored(rankings, setting)
    gold = judged(rankings, setting) if setting.judge else None
    manifest = read_manifest(config.reward_model_path) if config.reward_model_path else None
    report = ranking_accuracy(pairs, config.seed)
    report["gold_accuracy"] = gold_accuracy(pairs, gold, config.seed) if gold else None
    report["demonstration_mean"] = manifest.metrics.get("demonstration_mean") if manifest else None
    agreed = agreement(rankings, config.seed)
    return {"rm": report, "labelers": {"agreement": agreed.interval if agreed else None}}


def step_zero(config: EvaluateConfig) -> dict[str, float] | None:
    for path in (config.ppo_ptx_path, config.ppo_path):
        manifest = read_manifest(path) if path and Path(path).exists() else None
        if manifest and "step_zero" in manifest.metrics:
            return manifest.metrics["step_zero"]
    return None


def write_all(output: Path, evaluation: dict[str, Any], config: EvaluateConfig) -> None:
    summary = summarise(evaluation, config.seed)
    training = {"ppo": config.ppo_path, "ppo_ptx": config.ppo_ptx_path}
    logs = {name: read_jsonl(Path(path) / "metrics.jsonl") for name, path in training.items() if path}
    sft = read_jsonl(Path(config.sft_path) / "metrics.jsonl")
    plots = write_plots(output / "plots", evaluation, summary, training={k: v for k, v in logs.items() if v}, sft=sft)
    write_report(output, evaluation, plots, summary)
    write_jsonl(output / "transcripts.jsonl", evaluation["transcripts"])
    write_json(Path(config.run_dir) / "evaluation.json", plain(evaluation))
    write_json(Path(config.run_dir) / "summary.json", summary)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
