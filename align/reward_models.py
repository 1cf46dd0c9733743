"""The config's `reward` as objects: which reward models read the policy's tokens and which read text, and where the
value model starts.

A reward model may have any tokenizer, size and architecture. It reads the sampled tokens where its tokenizer makes the
same ones of the same text; otherwise it reads the text of prompt and response in its own prompt format. The value
model must read the policy's tokens, so it starts from a reward model that does, or else from the policy.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from align.config import EnsembleTerm, FunctionTerm, ModelTerm, PPOConfig, RewardTerm, term_name
from align.errors import UserError, first_line
from align.manifest import check_parent, published_manifest, tokenizer_sha256
from align.models import ScalarModel
from align.ranking import Even
from align.rewards import FunctionReward, ModelReward, PairReward, Reward, RewardSum, Term, TextReward
from align.runtime import Runtime
from align.text import Codec
from align.track import announce
from align.types import Text
from align.user_code import import_function

LoadScalar = Callable[[str], ScalarModel]
PROBES = ("Name three animals.", "用中文说出三种水果。", "def f(x):\n    return 2 * x  # twice")


def model_paths(term: RewardTerm, place: str) -> dict[str, str]:
    """Config key -> path of a term's reward models."""
    if isinstance(term, EnsembleTerm):
        return {f"{place}.models[{j}]": path for j, path in enumerate(term.models)}
    return {f"{place}.model": term.model} if isinstance(term, ModelTerm) else {}


def check_reward_models(terms: tuple[RewardTerm, ...]) -> list[dict[str, Any]]:
    """Manifest entries of the reward models: finished ones of ours, or other people's. Functions are imported, so that
    a mistyped one stops before any model is loaded."""
    for i, term in enumerate(terms):
        if isinstance(term, FunctionTerm):
            import_function(term.function, f"reward[{i}].function")
    paths = [pair for i, term in enumerate(terms) for pair in model_paths(term, f"reward[{i}]").items()]
    return [check_parent(path, key, ("rm",)) for key, path in paths]


def build_reward(config: PPOConfig, codec: Codec, load_scalar: LoadScalar, runtime: Runtime) -> RewardSum:
    """The weighted sum that `reward` asks for, and a line for the user on each term."""
    terms = []
    for i, term in enumerate(config.reward):
        place, name = f"reward[{i}]", term_name(term)
        if isinstance(term, FunctionTerm):
            key = f"{place}.function"
            members: list[Reward] = [
                FunctionReward(term.function, codec, key, config.reward_timeout, config.reward_retries)
            ]
            what = [f"function {term.function}"]
        else:
            paths = model_paths(term, place)
            members = [
                load_reward(
                    path, key, codec, load_scalar, config.per_device_rollout_batch_size, config.microbatch_tokens,
                    runtime.compute_dtype, runtime.device, runtime.as_many,
                )
                for key, path in paths.items()
            ]  # fmt: skip
            what = [describe(path, member) for path, member in zip(paths.values(), members, strict=True)]
        announce(f"reward {name}, weight {term.weight:g}: {'; '.join(what)}")
        if isinstance(term, EnsembleTerm):
            terms.append(Term(name, term.weight, members, term.combine, term.coef))
        else:
            terms.append(Term(name, term.weight, members))
    return RewardSum(terms)


def load_reward(
    path: str, key: str, codec: Codec, load_scalar: LoadScalar, batch_size: int, max_tokens: int | None = None,
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", even: Even | None = None,
) -> Reward:  # fmt: skip
    """A reward model, reading what it can: the policy's tokens (`codec`'s), its own, or pairs of texts.

    `load_scalar` loads, and places and freezes as the caller likes, what has a linear head; the rest goes to `device`,
    whole in each process. `even` as in `score_rows`.
    """
    config = reward_config(path, key)
    if not has_linear_score(config):
        model, tokenizer, context = load_classifier(path, key, dtype)
        return PairReward(model.to(device), tokenizer, codec, context, batch_size, max_tokens)
    if reads_sampled_tokens(path, codec):
        return ModelReward(load_scalar(path), codec.pad_id, codec.eos_id, batch_size, max_tokens, even)
    return TextReward(load_scalar(path), reward_codec(path), codec, batch_size, max_tokens, even)


def load_classifier(
    path: str, key: str, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, int | None]:
    """A frozen classifier with the head it was trained with, its tokenizer, and how many tokens it can read."""
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=dtype, use_safetensors=True, output_loading_info=True, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{key}: {path}: could not be loaded ({first_line(error)}); give a classifier and its tokenizer"
        ) from None
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])[0]
        raise UserError(f"{key}: {path}: has no trained head ({missing} is missing), so it is no reward model")
    limits = (tokenizer.model_max_length, positions(model))
    context = min((limit for limit in limits if limit and limit < 1e9), default=None)
    return model.requires_grad_(False).eval(), tokenizer, context


def positions(model: PreTrainedModel) -> int | None:
    """How many tokens a classifier's table of positions has room for; RoBERTa's first ones are taken, up to its pad."""
    count = getattr(model.config, "max_position_embeddings", None)
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    taken = next((table.padding_idx + 1 for table in tables if getattr(table, "padding_idx", None) is not None), 0)
    return None if count is None else count - taken


def reward_config(path: str, key: str) -> PreTrainedConfig:
    """The model's config, after checking that it says: a classifier with one number out."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{key}: {path}: no model could be loaded ({first_line(error)}); give a folder or hub id"
        ) from None
    made = (config.architectures or ["unknown"])[0]
    if not made.endswith("ForSequenceClassification"):
        raise UserError(f"{key}: {path}: is a {made} without a head that scores, so it is no reward model")
    if config.num_labels != 1:
        raise UserError(f"{key}: {path}: its head has {config.num_labels} labels; a reward model has one")
    return config


def has_linear_score(config: PreTrainedConfig) -> bool:
    """A causal language model's body with a linear head `score`, which `ScalarModel` reads."""
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    return isinstance(getattr(model, "score", None), nn.Linear)


def reads_sampled_tokens(path: str, codec: Codec) -> bool:
    """Whether a model reads the policy's tokens as they were sampled: it knows each of them under the same number, and
    makes the same of a prompt and a response (template, BOS, merges, what closes it). One that came without a tokenizer
    was trained on the policy's own sequences."""
    if has_no_tokenizer(path):
        return True
    try:
        own = reward_codec(path)
    except UserError:  # no EOS, as BERT's has none
        return False
    if not codec.tokenizer.get_vocab().items() <= own.tokenizer.get_vocab().items():
        return False
    if own.tokenizer.chat_template != codec.tokenizer.chat_template:  # may differ in what no probe has, as tools
        return False
    probes = list(PROBES)  # as responses they end in EOS
    return own.prompts(probes) == codec.prompts(probes) and own.responses(probes) == codec.responses(probes)


def require_same_tokens(path: str, key: str, codec: Codec) -> None:
    """Raises UserError where a model does not know the policy's tokens by the same numbers, but for pad."""
    if has_no_tokenizer(path):  # it was trained on the policy's own sequences
        return
    theirs, spared = Codec.load(path).tokenizer.get_vocab(), {codec.pad_id} - {codec.eos_id}
    for token, number in codec.tokenizer.get_vocab().items():
        if theirs.get(token) != number and number not in spared:
            what = "does not know" if token not in theirs else "has another number for"
            remedy = "give a model that reads the same tokens"
            raise UserError(f"{key}: {path}: its tokenizer {what} the policy's token {token!r}; {remedy}")


def has_no_tokenizer(path: str) -> bool:
    return Path(path).is_dir() and tokenizer_sha256(path) is None


ANSWER = "\ufdd2"  # a noncharacter that stands for the answer in a template's text


class ClosedCodec(Codec):
    """A conversation as another's reward model learned it: what its template writes before an answer, which may be more
    than a prompt for one (an empty <think></think>), and after it, where the model is read."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        super().__init__(tokenizer)
        self.closing = [self.eos_id]
        if tokenizer.chat_template is not None:
            _, answered, after = self._whole([{"role": "user", "content": "question"}]).partition(ANSWER)
            ids = tokenizer(after, add_special_tokens=False)["input_ids"] if answered else []
            self.closing = ids or self.closing

    def _whole(self, messages: list[dict]) -> str:
        return self._template([*messages, {"role": "assistant", "content": ANSWER}])

    def _apply(self, messages: list[dict]) -> str:
        before, answered, _ = self._whole(messages).partition(ANSWER)
        return before if answered else super()._apply(messages)

    def responses(self, completions: list[Text]) -> list[list[int]]:
        return [[*row[:-1], *self.closing] for row in super().responses(completions)]


def say_other_end(path: str, codec: Codec) -> None:
    """Warn of a policy of other makers whose template ends an answer with another token than EOS, which alone ends one
    here: until SFT has taught it that, next to none of its answers would count as ended."""
    if published_manifest(path) is not None:
        return
    special = {i for i, token in codec.tokenizer.added_tokens_decoder.items() if token.special}
    try:
        closing = ClosedCodec(codec.tokenizer).closing
    except TemplateError:  # of a template that refuses a question and an answer nothing is known
        return
    end = next((i for i in closing if i in special), codec.eos_id)
    if end != codec.eos_id:
        theirs, ours = codec.tokenizer.convert_ids_to_tokens([end, codec.eos_id])
        announce(
            f"warning: {path}: its template ends answers with {theirs}, and here EOS, {ours}, ends them: run sft on"
        )
        announce(f"it first, or make {theirs} the eos_token of its tokenizer")


def reward_codec(path: str) -> Codec:
    """How a reward model reads text, in training and evaluation alike: those of this pipeline a prompt, an answer and
    EOS, others as their makers' template writes a conversation."""
    codec = Codec.load(path)
    return codec if published_manifest(path) is not None else ClosedCodec(codec.tokenizer)


def describe(path: str, reward: Reward) -> str:
    """What a reward model reads, and whether its zero means something."""
    reads = {
        ModelReward: "reads the sampled tokens",
        TextReward: "has a tokenizer or format of its own, so it reads text",
        PairReward: "is no causal language model, so it reads pairs of texts",
    }[type(reward)]
    if published_manifest(path) is not None:
        return f"{path} {reads}"
    return f"{path} {reads} (no manifest: its 0 is not the mean of demonstrations, see missing_eos_penalty)"


@dataclass(frozen=True)
class ValueStart:
    """Where the value model starts."""

    path: str
    fresh_head: bool = False
    term: str | None = None  # of the reward, whose score is the value at a response's last token before training

    def __str__(self) -> str:
        if self.fresh_head:
            return f"value model: {self.path} with a fresh head, as no reward model reads its tokens; no score to check"
        compared = f"the score of {self.term}" if self.term else "no score"
        return f"value model: {self.path}, compared with {compared} at step zero"


def value_start(config: PPOConfig, codec: Codec) -> ValueStart:
    """`value_model_path`, else the first reward model that reads the policy's tokens, else the policy (section 3.5)."""
    models = {term.model: term_name(term) for term in reversed(config.reward) if isinstance(term, ModelTerm)}
    if path := config.value_model_path:
        return ValueStart(path, term=models.get(path) if reads_sampled_tokens(path, codec) else None)
    for i, term in enumerate(config.reward):
        for key, path in model_paths(term, f"reward[{i}]").items():
            if has_linear_score(reward_config(path, key)) and reads_sampled_tokens(path, codec):
                return ValueStart(path, term=models.get(path))
    return ValueStart(config.model_name_or_path, fresh_head=True)
