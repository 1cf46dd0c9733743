"""What a policy answers, and how good, how far from SFT and how fluent it is."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.config import EvaluateChoicesConfig, EvaluateConfig
from align.errors import UserError
from align.evaluate.reward_report import require_scores
from align.generate import make_sampler, uniform_numbers
from align.judge import Judge
from align.manifest import check_parent
from align.maths.masks import length_mask
from align.maths.reduce import masked_row_sum
from align.maths.repetition import repeated_ngrams
from align.models import (
    Policy,
    ScalarModel,
    document_nll,
    load_packed_policy,
    load_scalar_model,
    response_logprobs,
)
from align.packing import SCORED_TOKENS, token_batches
from align.ranking import score_rankings
from align.reward_models import load_reward, require_same_tokens, say_other_end
from align.rewards import FunctionReward, ModelReward, Reward
from align.runtime import Runtime, gather_list, my_share
from align.text import Codec
from align.track import announce
from align.types import Demonstration, Episode, Prompt, Ranking, contents, pad_rows


@dataclass(frozen=True)
class Setting:
    """What every policy is measured with."""

    codec: Codec
    prompts: list[Prompt]
    sft: torch.nn.Module
    reward: Reward
    judge: Judge | None  # None: the reward model alone compares
    max_new_tokens: int
    batch_size: int
    seed: int
    context: int | None = None  # tokens that SFT can read


def policy_paths(config: EvaluateConfig | EvaluateChoicesConfig, codec: Codec) -> dict[str, str | None]:
    """Checked checkpoints by policy, which all read SFT's tokens; a PPO folder that was not written counts as not
    trained."""
    paths = {"base": config.base_path, "sft": config.sft_path}
    for name, path in (("ppo", config.ppo_path), ("ppo_ptx", config.ppo_ptx_path)):
        there = path and any((Path(path) / file).exists() for file in ("config.json", "adapter_config.json"))
        absent = path and not there and Path(path).parent.exists()  # of a run; else a hub id, or a wrong path
        paths[name] = None if absent else path
        if absent:
            announce(f"{name}_path: {path} holds no model: not evaluated")
    for name, path in paths.items():
        if path and name != "sft":  # whose own tokens they are; checked before
            check_parent(path, f"{name}_path", ("base",) if name == "base" else ("ppo",))
            require_same_tokens(path, f"{name}_path", codec)
    say_other_end(config.sft_path, codec)
    return paths


def load_evaluated(path: str, config: EvaluateConfig | EvaluateChoicesConfig, runtime: Runtime) -> Policy:
    return load_packed_policy(path, config.attn_implementation, runtime.compute_dtype).to(runtime.device).eval()


def load_proxy(config: EvaluateConfig, codec: Codec, runtime: Runtime) -> Reward:
    """What scores every answer: the reward model, or a function in its place."""
    if config.reward_function:
        return FunctionReward(config.reward_function, codec, "reward_function")

    def load_scalar(path: str) -> ScalarModel:
        return load_scalar_model(path, config.attn_implementation).to(runtime.device)  # float32: rounding makes ties

    size, device = config.per_device_batch_size, runtime.device
    how = {"batch_size": size, "max_tokens": SCORED_TOKENS, "device": device}
    return load_reward(config.reward_model_path, "reward_model_path", codec, load_scalar, **how)


def answer(
    policy: torch.nn.Module,
    setting: Setting,
    temperature: float,
    runtime: Runtime,
    few_shot: list[tuple[str, str]] = (),
) -> list[dict[str, Any]]:
    """One record a prompt. With `few_shot` the policy sees solved examples first; its answer ends at a newline.

    "kl" is the answer's log-ratio at the temperature that drew it, of greedy answers (temperature 0) at 1.
    """
    codec, prompts = setting.codec, setting.prompts
    plain = codec.prompts([prompt.prompt for prompt in prompts])
    queries = codec.few_shot(few_shot, [prompt.prompt for prompt in prompts]) if few_shot else plain
    if few_shot:
        require_room(queries, setting)
    uniforms = uniform_numbers(len(queries), setting.max_new_tokens, setting.seed, 0)
    mine, picked = runtime.mine(queries), runtime.mine(list(range(len(queries))))
    if not mine:  # more processes than prompts
        return gather_list([])
    episodes = sample(policy, mine, uniforms[picked], temperature, setting, runtime)
    drawn = [len(episode.response) for episode in episodes]  # without the EOS that closes an answer that is cut
    if few_shot:
        answers = [cut_at_newline(episode, codec) for episode in episodes]
        drawn = [n if a is e else len(a.response) - 1 for n, a, e in zip(drawn, answers, episodes, strict=True)]
        episodes = answers
    rows = [record(prompts[i], e, setting) for i, e in zip(picked, episodes, strict=True)]
    own = [Episode(tuple(plain[i]), e.response, e.finished) for i, e in zip(picked, episodes, strict=True)]
    with torch.no_grad(), runtime.autocast():
        here = sequence_logprobs(policy, episodes, drawn, setting, runtime.device, temperature or 1.0)
        there = here
        if few_shot or policy is not setting.sft:
            there = sequence_logprobs(setting.sft, own, drawn, setting, runtime.device, temperature or 1.0)
    proxies = proxy_scores([prompts[i] for i in picked], own, setting)
    for row, kl, proxy in zip(rows, (here - there).tolist(), proxies, strict=True):
        row |= {"kl": kl, "proxy": proxy}
    return gather_list(rows)


def answer_n(
    policy: torch.nn.Module, setting: Setting, n: int, temperature: float, runtime: Runtime
) -> list[dict[str, list[float]]]:
    """n answers to each prompt, drawn with random numbers of their own: {"proxy": n scores} a prompt, and where there
    is a judge "gold": its n. Equal answers to a prompt are scored once, so they tie.
    """
    picked, limit = runtime.mine(list(range(len(setting.prompts)))), setting.max_new_tokens
    if not picked:
        return gather_list([])
    prompts = [setting.prompts[i] for i in picked]
    queries = [query for query in setting.codec.prompts([p.prompt for p in prompts]) for _ in range(n)]
    streams = [uniform_numbers(len(setting.prompts), limit, setting.seed, 1, k)[picked] for k in range(n)]
    uniforms = torch.stack(streams, 1).flatten(0, 1)  # (P x n, R)
    episodes = sample(policy, queries, uniforms, temperature, setting, runtime)
    keys = [(i // n, e.response, e.finished) for i, e in enumerate(episodes)]
    distinct = dict(zip(keys, episodes, strict=True))
    asked, answers = [prompts[i] for i, _, _ in distinct], list(distinct.values())
    scores = {"proxy": proxy_scores(asked, answers, setting)}
    if setting.judge:
        scores["gold"] = [float(verdict_on(p, e, setting).likert) for p, e in zip(asked, answers, strict=True)]
    place = {key: i for i, key in enumerate(distinct)}
    rows = [[place[key] for key in keys[i : i + n]] for i in range(0, len(keys), n)]
    return gather_list([{name: [values[i] for i in row] for name, values in scores.items()} for row in rows])


def sample(
    policy: torch.nn.Module, queries: list[list[int]], uniforms: Tensor, temperature: float,
    setting: Setting, runtime: Runtime,
) -> list[Episode]:  # fmt: skip
    """One episode a query of this process; uniforms (N, max_new_tokens)."""
    sampler = make_sampler(policy, setting.codec.eos_id, setting.codec.pad_id, setting.batch_size)
    with runtime.autocast():
        return sampler(queries, uniforms, temperature)


def proxy_scores(prompts: list[Prompt], episodes: list[Episode], setting: Setting) -> list[float]:
    with torch.no_grad():  # in float32: rounded scores would tie
        scores = setting.reward(prompts, episodes)
    require_scores([scores], "reward_model_path")
    return scores


def few_shot_examples(demonstrations: list[Demonstration]) -> list[tuple[str, str]]:
    """Prompt and answer of each. Raises UserError for conversations: the prefix of App. D is text."""
    for i, row in enumerate(demonstrations):
        if not isinstance(row.prompt, str) or not isinstance(row.completion, str):
            raise UserError(f"few_shot_file: row {i + 1} is a conversation; give its prompt and completion as text")
    return [(row.prompt, row.completion) for row in demonstrations]


def require_room(queries: list[list[int]], setting: Setting) -> None:
    longest = max(map(len, queries)) + setting.max_new_tokens
    if setting.context is not None and longest > setting.context:
        what = f"with it a prompt and its answer take {longest} tokens of {setting.context}"
        raise UserError(f"few_shot_file: {what}: give fewer or shorter examples")


def scored(rankings: list[Ranking], setting: Setting) -> list[tuple[Ranking, list[float]]]:
    """Each ranking with its completions' scores. Each process scores its share; all have all scores."""
    reward, codec = setting.reward, setting.codec
    if isinstance(reward, ModelReward):
        return score_rankings(reward.model, rankings, codec, setting.batch_size)
    mine = [rankings[i] for i in my_share(len(rankings))]
    prompts = [Prompt(ranking.prompt, ranking.columns) for ranking in mine for _ in ranking.completions]
    answers = codec.responses([completion for ranking in mine for completion in ranking.completions])
    scores = iter(reward(prompts, [Episode((), tuple(answer), True) for answer in answers]) if mine else ())
    found = gather_list([[next(scores) for _ in ranking.completions] for ranking in mine])
    return list(zip(rankings, found, strict=True))


def judged(rankings: list[Ranking], setting: Setting) -> list[list[float]]:
    """The judge's Likert scores of each ranking's completions. Each process asks for its share; all have all."""

    def scores(ranking: Ranking) -> list[float]:
        row, finished = {"prompt": ranking.prompt, **ranking.columns}, ranking.columns.get("finished")
        done = finished if isinstance(finished, (list, tuple)) else [True] * len(ranking.completions)  # collect's list
        return [setting.judge(row, contents(c), end).likert for c, end in zip(ranking.completions, done, strict=True)]

    return gather_list([scores(rankings[i]) for i in my_share(len(rankings))])


def record(prompt: Prompt, episode: Episode, setting: Setting) -> dict[str, Any]:
    row = {"prompt": prompt.prompt, **prompt.columns}
    judged = verdict_on(prompt, episode, setting) if setting.judge else None
    fields = {name: value for name, value in judged.as_dict().items() if name != "likert"} if judged else {}
    shown = {key: row.get(key) for key in ("id", "prompt", "use_case", "source", "language", "constraint")}
    tokens = torch.tensor([episode.response])
    return shown | {
        "response": setting.codec.decode(episode.response).strip(),
        "likert": judged.likert if judged else None,
        "fields": fields,
        "finished": episode.finished,
        "response_tokens": len(episode.response),
        "repetition": float(repeated_ngrams(tokens, torch.tensor([len(episode.response)]))),
    }


def verdict_on(prompt: Prompt, episode: Episode, setting: Setting) -> Any:
    row = {"prompt": prompt.prompt, **prompt.columns}
    return setting.judge(row, setting.codec.decode(episode.response), episode.finished)


def cut_at_newline(episode: Episode, codec: Codec) -> Episode:
    """The answer alone, closed by EOS: a few-shot prompted base model goes on with the next instruction after a newline
    (App. D)."""
    for i in range(1, len(episode.response) + 1):
        text = codec.decode(episode.response[:i])
        if text.strip() and "\n" in text.lstrip():
            return Episode(episode.query, (*episode.response[: i - 1], codec.eos_id), True)
    return episode


def sequence_logprobs(
    policy: Policy, episodes: list[Episode], drawn: list[int], setting: Setting, device, temperature: float
) -> Tensor:
    """Log-probability of the first `drawn` tokens of each response. (N,)"""
    totals = torch.zeros(len(episodes))
    for rows in token_batches([len(e.query) + len(e.response) for e in episodes], setting.batch_size, SCORED_TOKENS):
        batch = [episodes[i] for i in rows]
        ids = pad_rows([[*e.query, *e.response] for e in batch], setting.codec.pad_id).to(device)
        starts = torch.tensor([len(e.query) for e in batch], device=device)
        lengths = torch.tensor([len(e.response) for e in batch], device=device)
        logprobs = response_logprobs(policy, ids, starts, lengths, temperature)[0].cpu()  # (B, R)
        counted = length_mask(torch.tensor([drawn[i] for i in rows]), logprobs.shape[1])
        totals[rows] = masked_row_sum(logprobs, counted)
    return totals


@torch.no_grad()
def perplexity(policy: Policy, documents: list[list[int]], batch_size: int, device) -> float | None:
    """exp of the mean negative log-likelihood of a token, documents' first tokens not predicted. None without any.

    Each process reads its share; all have the same number.
    """
    if not documents:
        return None
    batches = token_batches([len(document) for document in documents], batch_size, SCORED_TOKENS)
    mine = [batches[i] for i in my_share(len(batches))]
    sums = gather_list([float(document_nll(policy, [documents[i] for i in rows], device)) for rows in mine])
    return math.exp(math.fsum(sums) / sum(len(document) - 1 for document in documents))
