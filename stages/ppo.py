"""Stage 3: prompts, policy, reward model -> policy, by PPO or PPO-ptx (paper section 3.5, Eq. 2, App. C.4).

    maximise  E_policy[ r(x, y) - kl_coef * log(policy(y|x) / ref(y|x)) ] + ptx_coef * E_pretrain[ log policy(x) ]

A bandit: a random prompt, one response, one score, the end. The KL penalty is paid token by token, the score comes on
the last token; a value model that starts as the reward model turns them into advantages (no discount, GAE 0.95).
ptx_coef 0 is plain PPO. What the paper leaves open, and the choice here:
 1. ptx_coef multiplies the mean loss of a pretraining token; 2. Adam epsilon 1e-5, missing EOS scores -1, advantages
 are whitened over the rollout (Stiennon et al. 2020 and its reproductions); 3. the weight average is taken each
 optimiser step, and the averaged policy is the one saved; 4. the warm-up ramp is linear.

    python -m stages.ppo --config configs/tiny/ppo.yaml --run runs/tiny
    accelerate launch --config_file configs/accelerate/multi_gpu.yaml -m stages.ppo --config ...
"""

import sys

from tqdm import tqdm

from align.checkpoint import is_finished
from align.config import PPOConfig
from align.evaluate.plots import plot_overoptimisation
from align.interrupt import Interrupted, arrived, deferred
from align.learn import (
    build_actors,
    build_learner,
    kl_stop_reason,
    load_inputs,
    load_state,
    next_kl_coef,
    save_policy,
    save_state,
    set_learning_rates,
)
from align.order import Cursor
from align.parse import parse
from align.resume import start_run
from align.rewards import GoldJudge
from align.rollout import check_step_zero, collect_rollout
from align.runtime import Runtime, tune_cpu
from align.track import Metrics, Transcripts, announce, overoptimisation_rows, ppo_metrics, read_jsonl
from align.update import BatchAlgebra, update
from align.value_head import fit_value_head
from stages.__main__ import run


def main(argv: list[str]) -> None:
    # 1. Config, processes, batch algebra.
    config = parse(PPOConfig, argv)
    if is_finished(config.output_dir, config.resume_from_checkpoint):
        return
    tune_cpu()
    runtime = Runtime(config.seed, config.bf16)
    algebra = BatchAlgebra.of(config, runtime.world)
    announce(str(algebra))

    # 2. Parents, prompts, pretraining documents, folder.
    inputs = load_inputs(config)
    codec = inputs.codec
    output, checkpoint = start_run(config, inputs.parents, inputs.reports)

    # 3. Policy and reference from SFT, reward and value model from the reward model; two optimisers; weight average.
    learner = build_learner(config, inputs.value_start, runtime)
    actors = build_actors(config, inputs, learner, runtime)
    prompts = Cursor(len(inputs.queries), config.seed)
    documents = Cursor(max(len(inputs.texts), 1), config.seed + 1)
    first, kl_coef, step_zero, row, stopped = 0, config.kl_coef, {}, {}, None
    if checkpoint:
        first, adapted, step_zero, row = load_state(checkpoint, learner, prompts, documents, runtime)
        kl_coef = config.kl_coef if config.kl_target is None else adapted
        stopped = kl_stop_reason(row["objective/kl"], config, first)
    metrics, transcripts = Metrics(output, checkpoint, config), Transcripts(output)
    judge = GoldJudge(config.judge, codec)

    # 4. Iterate: rollout, update, log.
    with deferred():
        iterations = range(first, first if stopped else algebra.iterations)
        for iteration in tqdm(iterations, desc="ppo", disable=not runtime.is_main):
            set_learning_rates(learner, config, iteration, algebra.iterations)
            queries = [inputs.queries[i] for i in prompts.take(algebra.rollout)]
            rollout = collect_rollout(queries, actors, config, runtime, kl_coef, iteration)
            if iteration == 0:
                step_zero = check_step_zero(rollout, actors, config, runtime, codec.eos_id, inputs.value_start.term)
                rollout, value_head = fit_value_head(rollout, learner.value_model, config, runtime)
                step_zero |= value_head
            stats = update(rollout, learner, inputs.next_documents(documents), config, runtime, iteration)
            row = ppo_metrics(rollout, stats, kl_coef, learner.policy_optimizer.param_groups[0]["lr"])
            kl_coef = next_kl_coef(kl_coef, row["objective/kl"], config, iteration)
            done = iteration + 1
            row |= judge.score([query.prompt for query in queries], rollout)
            metrics.log(done, {"episode": done * algebra.rollout, **row})
            if config.transcript_iterations and iteration % config.transcript_iterations == 0:
                transcripts.write(iteration, rollout, codec)
            stopped, signal = kl_stop_reason(row["objective/kl"], config, done), arrived()
            if stopped or signal or (config.save_iterations and done % config.save_iterations == 0):
                save_state(output, done, learner, prompts, documents, kl_coef, step_zero, row, config, codec, runtime)
            if signal:
                raise Interrupted(signal, output / f"checkpoint-{done}")
            if stopped:
                break

    # 5. Save the averaged policy, the manifest last.
    if config.judge and runtime.is_main:
        plot_overoptimisation(overoptimisation_rows(read_jsonl(metrics.path)), output / "overoptimisation.png")
    save_policy(output, learner, codec, config, inputs, {"step_zero": step_zero, "stopped": stopped, **row}, runtime)
    announce(f"policy in {output}; next: make evaluate")


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
