"""Policy -> K samples a prompt -> rankings (paper section 3.4, App. A.3: K between 4 and 9, ties allowed).

    for each prompt: draw K from 4..9; sample K responses; a labeler ranks the distinct ones

Labelers come by import path, so a simulation and a queue of people look the same. Without `labelers` the samples are
written for people to rank, on the pages of `align label` or as they like; `align validate` reads them back.

    python -m stages.collect --config configs/tiny/collect.yaml --run runs/tiny
"""

import sys

from align.checkpoint import start_output
from align.collect import TOO_FEW, Candidates, draw_k, group, load_labelers, own_columns, rank_all
from align.config import CollectConfig
from align.data import load_prompts
from align.errors import UserError
from align.files import atomic_contents, write_jsonl
from align.generate import Sampler, make_sampler, uniform_numbers
from align.lengths import drop_long
from align.manifest import check_parent, write_manifest
from align.models import load_packed_policy, require_context
from align.parse import parse
from align.reward_models import say_other_end
from align.runtime import Runtime, gather_list, is_main_process, tune_cpu
from align.splits import refuse_eval_only
from align.text import Codec
from align.track import announce, say_dropped
from align.types import Prompt
from stages.__main__ import run


def main(argv: list[str]) -> None:
    # 1. Config, policy, prompts, folder.
    config = parse(CollectConfig, argv)
    tune_cpu()
    parents = [check_parent(config.model_name_or_path, "model_name_or_path", ("sft", "ppo", "base"))]
    codec = Codec.load(config.model_name_or_path)
    require_context(config.model_name_or_path, config.max_prompt_length, config.max_new_tokens)
    files = {"train": config.prompts_file, "validation": config.validation_prompts_file}
    loaded = {name: load_prompts(path, config.on_bad_rows) for name, path in files.items() if path}
    refuse_eval_only(*loaded["train"])
    limit = config.max_prompt_length
    loaded = {name: drop_long(prompts, codec, limit, report) for name, (prompts, report) in loaded.items()}
    say_dropped({f"{name}_prompts": report for name, (_, report) in loaded.items()})
    say_other_end(config.model_name_or_path, codec)
    output = start_output(config.output_dir, config.overwrite_output_dir)
    runtime = Runtime(config.seed, config.bf16)
    dtype = runtime.compute_dtype
    policy = load_packed_policy(config.model_name_or_path, config.attn_implementation, dtype).to(runtime.device)
    sampler = make_sampler(policy, codec.eos_id, codec.pad_id, config.per_device_batch_size, "sampling")

    # 2. Sample K responses a prompt.
    candidates = {
        name: sample(prompts, sampler, codec, config, runtime, stream)
        for stream, (name, (prompts, _)) in enumerate(loaded.items())
    }

    # 3. Rank, and write.
    if is_main_process():
        tables, metrics = rank(candidates, config)
        with atomic_contents(output) as folder:
            for name, rows in tables.items():
                write_jsonl(folder / f"{name}.jsonl", rows)
            reports = {f"{name}_prompts": report for name, (_, report) in loaded.items()}
            write_manifest(folder, "collect", config, config.seed, parents, reports, metrics)
    after = "make rm" if config.labelers else "`align label` makes pages to rank them on, for rm"
    announce(f"rankings in {output}; next: {after}")


def sample(
    prompts: list[Prompt], sampler: Sampler, codec: Codec, config: CollectConfig, runtime: Runtime, stream: int
) -> list[Candidates]:
    sizes = draw_k(len(prompts), config.min_k, config.max_k, config.seed + stream)
    queries = codec.prompts([prompt.prompt for prompt in prompts])
    repeated = [query for query, size in zip(queries, sizes, strict=True) for _ in range(size)]
    uniforms = uniform_numbers(len(repeated), config.max_new_tokens, config.seed, stream)
    with runtime.autocast():
        mine = sampler(runtime.mine(repeated), runtime.mine(uniforms), config.temperature)
    return group(prompts, sizes, gather_list(mine), codec)


def rank(candidates: dict[str, list[Candidates]], config: CollectConfig) -> tuple[dict, dict]:
    """Tables of rows by file name, and what the manifest says of them."""
    if config.labelers is None:
        return to_label(candidates)
    team = load_labelers(config.labelers, "labelers", config.seed)
    jobs = [("train", team, config.labelers_per_prompt), ("validation", team, config.validation_labelers_per_prompt)]
    if config.held_out_labelers:
        held_out = load_labelers(config.held_out_labelers, "held_out_labelers", config.seed)
        jobs.append(("held_out", held_out, len(held_out)))
    tables, metrics = {}, {}
    for name, labelers, per_prompt in jobs:
        source = candidates.get("validation" if name == "held_out" else name, [])
        tables[name], skipped = rank_all(source, labelers, per_prompt, config.seed)
        metrics[name] = {"prompts": len(source), "rankings": len(tables[name]), "skipped": dict(skipped)}
    if not tables["train"]:
        why = ", ".join(f"{count} {kind}" for kind, count in metrics["train"]["skipped"].items())
        raise UserError(f"labelers: no prompt gave a ranking ({why}); raise temperature or max_k")
    return tables, metrics


def to_label(candidates: dict[str, list[Candidates]]) -> tuple[dict, dict]:
    """The same with empty ranks, for people to fill in."""
    tables, metrics = {}, {}
    for name, source in candidates.items():
        some = [candidate for candidate in source if len(candidate.completions) > 1]
        tables[f"{name}_to_label"] = [
            {
                "prompt": candidate.prompt.prompt,
                "completions": [{"completion": text, "rank": None} for text in candidate.completions],
                **own_columns(candidate.prompt),
            }
            for candidate in some
        ]
        skipped = {TOO_FEW: len(source) - len(some)}
        metrics[f"{name}_to_label"] = {"prompts": len(source), "rankings": len(some), "skipped": skipped}
    return tables, metrics


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
