"""Rewards: models and functions, and their weighted sum. Episodes in, one score each out.

A reward model reads the sampled tokens where its tokenizer is the policy's, and text where it is not. What a function
returns is checked, and asked for again where it failed. `align.reward_models` builds all this from a config.
"""

import asyncio
import functools
import inspect
import math
import queue
import statistics
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from align.errors import UserError
from align.lora import WithoutAdapter
from align.models import ScalarModel
from align.packing import token_batches
from align.ranking import Even, score_rows
from align.text import Codec
from align.types import Episode, Prompt, contents
from align.user_code import import_function, raised

RETRY_WAIT = 1.0  # seconds before a failed function is called again; doubles with each failure


class Reward(Protocol):
    """One model or one function."""

    notes: dict[str, float]  # of the last call, for the log: failed tries, share of rows that were cut

    def __call__(self, prompts: list[Prompt], episodes: list[Episode]) -> list[float]:
        """One score an episode, higher is better."""


class ScalarReward(ABC):
    """A language model with a scalar head. Rows over its context lose their first tokens, whose share is noted: `cut`.

    EOS (or what a template closes an answer with) stands behind truncated responses too: the model has learned to score
    at that position alone.
    """

    def __init__(
        self, model: ScalarModel | WithoutAdapter, pad_id: int, batch_size: int, max_tokens: int | None = None,
        even: Even | None = None,
    ):  # fmt: skip
        self.model, self.pad_id = model, pad_id
        self.batch_size, self.max_tokens, self.even = batch_size, max_tokens, even
        self.notes: dict[str, float] = {}

    def __call__(self, prompts: list[Prompt], episodes: list[Episode]) -> list[float]:
        rows, context = self.rows(prompts, episodes), self.model.context
        if context is not None:
            self.notes = {"cut": sum(len(row) > context for row in rows) / max(1, len(rows))}
            rows = [row[-context:] for row in rows]
        with self.model.cached_casts():
            return score_rows(self.model, rows, self.pad_id, self.batch_size, self.max_tokens, self.even)

    @abstractmethod
    def rows(self, prompts: list[Prompt], episodes: list[Episode]) -> list[list[int]]:
        """The tokens to read of each episode."""


class ModelReward(ScalarReward):
    """A reward model that shares the policy's tokenizer: it reads the very tokens that were sampled."""

    def __init__(
        self, model: ScalarModel | WithoutAdapter, pad_id: int, eos_id: int, batch_size: int,
        max_tokens: int | None = None, even: Even | None = None,
    ):  # fmt: skip
        super().__init__(model, pad_id, batch_size, max_tokens, even)
        self.eos_id = eos_id

    def rows(self, prompts: list[Prompt], episodes: list[Episode]) -> list[list[int]]:
        return [[*e.query, *e.response, *([] if e.finished else [self.eos_id])] for e in episodes]


class TextReward(ScalarReward):
    """A reward model with a tokenizer, prompt format or end of its own (`codec`): text crosses, its tokens are read."""

    def __init__(
        self, model: ScalarModel, codec: Codec, policy_codec: Codec, batch_size: int, max_tokens: int | None = None,
        even: Even | None = None,
    ):  # fmt: skip
        super().__init__(model, codec.pad_id, batch_size, max_tokens, even)
        self.codec, self.policy_codec = codec, policy_codec

    def rows(self, prompts: list[Prompt], episodes: list[Episode]) -> list[list[int]]:
        queries = self.codec.prompts([prompt.prompt for prompt in prompts])
        responses = self.codec.responses([self.policy_codec.decode(episode.response) for episode in episodes])
        return [[*query, *response] for query, response in zip(queries, responses, strict=True)]


class PairReward:
    """A reward model that is no causal language model (DeBERTa, RoBERTa): its head reads the prompt and the response as
    a text pair; a truncated response is scored as if it had ended. Pairs over `context` tokens are cut on the left."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, policy_codec: Codec, context: int | None,
        batch_size: int, max_tokens: int | None = None,
    ):  # fmt: skip
        self.model, self.tokenizer, self.policy_codec = model, tokenizer, policy_codec
        self.context, self.batch_size, self.max_tokens = context, batch_size, max_tokens
        self.notes: dict[str, float] = {}

    def __call__(self, prompts: list[Prompt], episodes: list[Episode]) -> list[float]:
        answers = [self.policy_codec.decode(episode.response) for episode in episodes]
        pairs = [(contents(prompt.prompt), answer) for prompt, answer in zip(prompts, answers, strict=True)]
        scores, cut = score_pairs(self.model, self.tokenizer, pairs, self.context, self.batch_size, self.max_tokens)
        if self.context is not None:
            self.notes = {"cut": cut / len(pairs)}
        return scores


@torch.no_grad()
def score_pairs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], context: int | None,
    batch_size: int, max_tokens: int | None = None,
) -> tuple[list[float], int]:  # fmt: skip
    """A classifier's scores of N (prompt, response) as its tokenizer joins the two, and how many were over `context`
    tokens: those are cut, on the left."""
    tokenizer.truncation_side = "left"
    lengths = [len(ids) for ids in tokenizer(*map(list, zip(*pairs, strict=True)))["input_ids"]]
    scores = [0.0] * len(pairs)
    for rows in token_batches(lengths, batch_size, max_tokens):
        asked, answers = zip(*(pairs[i] for i in rows), strict=True)
        batch = tokenizer(
            list(asked), list(answers), padding=True, return_tensors="pt", truncation=context is not None,
            max_length=context,
        ).to(model.device)  # fmt: skip
        for i, score in zip(rows, model(**batch).logits[:, 0].float().tolist(), strict=True):
            scores[i] = score
    return scores, 0 if context is None else sum(length > context for length in lengths)


class FunctionReward:
    """A Python function as TRL calls one: fn(prompts=, completions=, **columns) -> list of numbers, async or not.
    Completions are texts, also where prompts are conversations.

    One that raises, returns the wrong number of scores or one that is not finite, or takes over `timeout` seconds is
    called again, `retries` times at most; each failure is told on stderr and noted. `key` names it in errors.
    """

    def __init__(self, path: str, codec: Codec, key: str = "reward", timeout: float | None = None, retries: int = 0):
        self.path, self.codec, self.function = path, codec, import_function(path, key)
        self.key, self.timeout, self.retries = key, timeout, retries
        self.notes: dict[str, float] = {}

    def __call__(self, prompts: list[Prompt], episodes: list[Episode]) -> list[float]:
        completions = [self.codec.decode(episode.response) for episode in episodes]
        names = {name for prompt in prompts for name in prompt.columns}
        arguments = {name: [prompt.columns.get(name) for prompt in prompts] for name in sorted(names)}
        arguments |= {"prompts": [prompt.prompt for prompt in prompts], "completions": completions}
        failures = 0
        while True:
            self.notes = {"failures": float(failures)}
            try:
                return numbers(within(self.timeout, lambda: self.call(arguments)), prompts)
            except Exception as error:  # a user's code may raise anything; it ends the run with one line
                failures += 1
                self.give_up_or_wait(error, failures)

    def call(self, arguments: dict[str, list]) -> Any:
        """In float32 and without gradients, in whichever thread: a model in it computes what it does elsewhere."""
        with torch.no_grad(), without_autocast():
            return awaited(self.function(**arguments))

    def give_up_or_wait(self, error: Exception, failures: int) -> None:
        what = f"{self.key}: {self.path} {fault(error, self.path)}"
        if failures > self.retries:
            tries = f", the last of {failures} tries" if failures > 1 else ""
            words = "main thread", "threaded", "in thread 'reward function'"  # signal's, math-verify's, asyncio's
            in_thread = self.timeout is not None and any(word in str(error) for word in words)
            remedy = "it needs the main thread: set reward_timeout: null" if in_thread else "mend the function"
            if "string indices must be integers" in str(error):  # c[0]["content"], as TRL hands conversations over
                remedy = "completions are texts here, also where prompts are conversations (docs/rewards.md)"
            raise UserError(f"{what}{tries}; {remedy}") from error
        print(f"warning: {what}; failure {failures}, called again", file=sys.stderr)
        time.sleep(RETRY_WAIT * 2 ** (failures - 1))


def awaited(returned: Any) -> Any:
    """What a function returned, or what it does once it has been waited for, in one loop for the whole run: what it
    keeps between calls, such as connections, belongs to its loop."""
    if not inspect.isawaitable(returned):
        return returned

    async def wait() -> Any:
        return await returned

    return asyncio.run_coroutine_threadsafe(wait(), event_loop()).result()


@contextmanager
def without_autocast() -> Iterator[None]:
    kinds = {"cpu"} | ({torch.accelerator.current_accelerator().type} if torch.accelerator.is_available() else set())
    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@functools.cache
def event_loop() -> asyncio.AbstractEventLoop:
    loop, on_this_device = asyncio.new_event_loop(), device_of_this_thread()
    loop.call_soon(on_this_device)
    loop.call_soon(torch.set_grad_enabled, False)  # a thread's own, as autocast is
    threading.Thread(target=loop.run_forever, daemon=True, name="async reward functions").start()
    return loop


def device_of_this_thread() -> Callable[[], None]:
    """Gives what sets another thread's accelerator to this one's: a new thread starts on the first."""
    if not torch.accelerator.is_available():
        return lambda: None
    return functools.partial(torch.accelerator.set_device_index, torch.accelerator.current_device_index())


class Fault(Exception):
    """What a reward function did wrong without raising."""


def fault(error: Exception, path: str) -> str:
    return str(error) if isinstance(error, Fault) else raised(error, path)


def numbers(returned: Any, prompts: list[Prompt]) -> list[float]:
    try:
        scores = [float(score) for score in returned]
    except (TypeError, ValueError):
        raise Fault(f"returned {type(returned).__name__} that is no list of numbers") from None
    if len(scores) != len(prompts):
        raise Fault(f"returned {len(scores)} scores for {len(prompts)} episodes")
    if what := not_finite(scores, prompts):
        raise Fault(what)
    return scores


def not_finite(scores: list[float], prompts: list[Prompt]) -> str | None:
    """Names the first prompt whose score is NaN or infinite; None where there is none."""
    for number, (score, prompt) in enumerate(zip(scores, prompts, strict=True)):
        if not math.isfinite(score):
            name = prompt.columns.get("id", f"number {number} of the batch")
            return f"gave {score} for prompt {name!r}"
    return None


def within(seconds: float | None, call: Callable[[], Any]) -> Any:
    """What `call` returns or raises; Fault if that takes over `seconds`.

    Python cannot kill a thread. A call that hangs is left behind in a daemon thread: it keeps its memory and whatever
    it holds or computes until the process ends, which it does not hold up. One that hangs in C code without releasing
    the interpreter's lock stops this process too, and no timeout can see it; put such code into a process of its own.
    """
    if seconds is None:
        return call()
    outcome: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
    on_this_device = device_of_this_thread()

    def work() -> None:
        try:
            on_this_device()
            outcome.put((call(), None))
        except BaseException as error:
            outcome.put((None, error))

    threading.Thread(target=work, daemon=True, name="reward function").start()
    try:
        returned, error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise Fault(f"returned nothing within {seconds:g} s (reward_timeout)") from None
    if error is not None:
        raise error
    return returned


@dataclass(frozen=True)
class Term:
    """A term of the reward: one model or function, or an ensemble of models."""

    name: str
    weight: float
    members: Sequence[Reward]
    combine: str = "mean"
    coef: float = 1.0


@dataclass(frozen=True)
class Scores:
    """What a reward says of N episodes. `total` is trained on; `parts` are logged, each as objective/<key>:
    scores/<term> is a term's score before its weight, deviation/<term> that of an ensemble, the rest are notes."""

    total: list[float]  # N
    parts: dict[str, list[float]]  # N each


class RewardSum:
    """A weighted sum of terms."""

    def __init__(self, terms: Sequence[Term]):
        self.terms = terms

    def __call__(self, prompts: list[Prompt], episodes: list[Episode]) -> Scores:
        total, parts = [0.0] * len(episodes), {}
        for term in self.terms:
            each = [require_finite(member(prompts, episodes), prompts, term.name) for member in term.members]
            scores = combine(each, term.combine, term.coef)
            total = [t + term.weight * s for t, s in zip(total, scores, strict=True)]
            parts[f"scores/{term.name}"] = scores
            if len(each) > 1:
                parts[f"deviation/{term.name}"] = deviations(each)
            notes = [getattr(member, "notes", {}) for member in term.members]
            for note in sorted({key for noted in notes for key in noted}):
                mean = sum(noted.get(note, 0.0) for noted in notes) / len(notes)
                parts[f"{note}/{term.name}"] = [mean] * len(episodes)
        return Scores(total, parts)


def combine(members: list[list[float]], how: str, coef: float) -> list[float]:
    """M models' scores of N episodes as N scores: their mean, their least, or mean - coef x deviation.

    The last two are Coste et al. 2023's worst-case and uncertainty-weighted ensembles, which use the variance where
    this takes its root, as scores do not have its unit.
    """
    if how == "min":
        return [min(scores) for scores in zip(*members, strict=True)]
    means = [sum(scores) / len(members) for scores in zip(*members, strict=True)]
    if how == "mean":
        return means
    return [mean - coef * deviation for mean, deviation in zip(means, deviations(members), strict=True)]


def deviations(members: list[list[float]]) -> list[float]:
    """Population standard deviation over the M models, for each of N episodes; 0 for one model."""
    return [statistics.pstdev(scores) for scores in zip(*members, strict=True)]


def require_finite(scores: list[float], prompts: list[Prompt], term: str) -> list[float]:
    """The scores of a model, or an error."""
    if what := not_finite(scores, prompts):
        raise UserError(f"reward: {term} {what}; give finite numbers")
    return scores
