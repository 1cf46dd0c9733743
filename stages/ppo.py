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
from align.held_out import HeldOut
from align.interrupt import Interrupted, arrived, deferred
from align.judge import GoldJudge
from align.learn import (
    Progress,
    build_learner,
    build_rollout_models,
    load_inputs,
    load_state,
    save_policy,
    save_state,
    set_learning_rates,
    stop_for_kl,
)
from align.parse import parse
from align.resume import start_run
from align.rollout import collect_rollout
from align.runtime import Runtime, is_main_process, tune_cpu
from align.step_zero import check_step_zero
from align.track import Metrics, Transcripts, announce, overoptimisation_rows, ppo_metrics, read_jsonl, shown
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
    codec, start = inputs.codec, inputs.value_start
    output, checkpoint = start_run(config, inputs.parents, inputs.reports)

    # 3. Policy and reference from SFT, reward and value model from the reward model; two optimisers; weight average.
    learner = build_learner(config, start, runtime)
    models = build_rollout_models(config, codec, start, learner, runtime)
    progress = Progress.at_start(inputs, config)
    if checkpoint:
        load_state(checkpoint, progress, learner, config, runtime)
    metrics, transcripts = Metrics(output, checkpoint, config), Transcripts(output, config.transcript_iterations)
    judge = GoldJudge(config.judge, codec)
    held_out = HeldOut(inputs, learner, models, judge, config, runtime)

    # 4. Iterate: rollout, update, log.
    with deferred():
        held_out.start(progress, metrics)
        last = progress.done if (stopped := stop_for_kl(progress.row, progress.done, config)) else algebra.iterations
        for iteration in (bar := tqdm(range(progress.done, last), desc="ppo", disable=not is_main_process())):
            set_learning_rates(learner, config, iteration, algebra.iterations)
            queries = [inputs.queries[i] for i in progress.prompts.take(algebra.rollout)]
            rollout = collect_rollout(queries, models, progress.in_force(config), runtime, progress.kl_coef, iteration)
            if iteration == 0:
                progress.step_zero = check_step_zero(rollout, models, config, runtime, codec.eos_id, start.term)
                rollout, fit = fit_value_head(rollout, learner.value_model, config, runtime)
                progress.step_zero |= fit
            documents = inputs.next_documents(progress.documents)
            stats = update(rollout, learner, documents, config, runtime, iteration)
            row = ppo_metrics(rollout, stats, progress.kl_coef, learner.policy_optimizer.param_groups[0]["lr"])
            row |= judge.score([query.prompt for query in queries], rollout)
            stopped = stop_for_kl(row, iteration + 1, config)
            row |= held_out.measure(progress, iteration + 1, last=bool(stopped))
            progress.advance(row, config)
            metrics.log(progress.done, {"episode": progress.done * algebra.rollout, **row, **runtime.lap()})
            bar.set_postfix_str(shown(row))
            transcripts.write(iteration, rollout, codec)
            if (signal := arrived()) or stopped or progress.checkpoint_is_due(config):
                save_state(output, progress, learner, config, codec, runtime)
            if signal:
                raise Interrupted(signal, output / f"checkpoint-{progress.done}")
            if stopped:
                break

    # 5. Save the averaged policy, the manifest last.
    if config.judge and is_main_process():
        plot_overoptimisation(overoptimisation_rows(read_jsonl(metrics.path)), output / "overoptimisation.png")
    metrics_now = {"step_zero": progress.step_zero, "stopped": stopped, **progress.row}
    save_policy(output, learner, config, inputs, metrics_now, runtime)
    announce(f"policy in {output}; next: make evaluate")


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
