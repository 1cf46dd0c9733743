"""The one place where text becomes tokens. SFT, reward model, PPO and evaluation all come through here.

A prompt that is a conversation goes through the tokenizer's chat template with its generation prompt. A prompt that
is plain text is one user message when the tokenizer has a chat template, and is taken as it stands otherwise. A
response is the completion's own tokens followed by EOS, so a sequence trained on always starts with the sequence
sampled from, token for token.

What is learned is known from that join, never from the template: one without `{% generation %}` marks, or without a
generation prompt, masks the prompt all the same. Where a template refuses system messages, they stand before the first
question instead.
"""

from pathlib import Path

import torch
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from align.errors import UserError, first_line
from align.types import Text, pad_rows


class Codec:
    """Text in, token ids out, and back."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str = "tokenizer"):
        if tokenizer.eos_token_id is None:
            raise UserError(f"{name}: the tokenizer has no EOS token; a response could never end")
        self.tokenizer = tokenizer
        self.eos_id: int = tokenizer.eos_token_id
        # Padding is never learned from: lengths say what is real. When a tokenizer has no pad of its own, EOS may
        # fill the gap without harm.
        self.pad_id: int = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    @staticmethod
    def load(path: str, chat_template_path: str | None = None) -> "Codec":
        """The tokenizer of a folder or hub id; with a template in place of its own, where one is given."""
        try:
            codec = Codec(AutoTokenizer.from_pretrained(path, trust_remote_code=False), path)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path}: no tokenizer could be loaded ({first_line(error)}); give a checkpoint folder"
            ) from None
        if chat_template_path:
            codec.tokenizer.chat_template = _read_template(chat_template_path)
            if "question" not in codec.render("question"):
                raise UserError(f"chat_template_path: {chat_template_path}: leaves the question out; mend the template")
        return codec

    def save(self, folder: str | Path) -> None:
        self.tokenizer.save_pretrained(folder)

    def prompt(self, prompt: Text) -> list[int]:
        """Token ids of the query, generation prompt included."""
        return self.prompts([prompt])[0]

    def prompts(self, prompts: list[Text]) -> list[list[int]]:
        if not prompts:
            return []
        if self.tokenizer.chat_template is None:
            if not all(isinstance(prompt, str) for prompt in prompts):
                raise UserError("a prompt is a conversation but the tokenizer has no chat template; use plain text")
            return self.tokenizer(prompts)["input_ids"]
        return self.tokenizer([self.render(prompt) for prompt in prompts], add_special_tokens=False)["input_ids"]

    def render(self, prompt: Text) -> str:
        """The text of the query, generation prompt included; plain text as it stands without a chat template."""
        if self.tokenizer.chat_template is None:
            return prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
        try:
            return self._apply(messages)
        except TemplateError as error:
            folded = fold_system(messages)
            if folded == messages:
                raise UserError(
                    f"the chat template refuses a prompt ({error}); mend the data or the template"
                ) from None
        try:
            return self._apply(folded)
        except TemplateError as error:
            raise UserError(f"the chat template refuses a prompt ({error}); mend the data or the template") from None

    def _apply(self, messages: list[dict]) -> str:
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    def response(self, completion: Text) -> list[int]:
        """Token ids of the completion, closed by EOS."""
        return self.responses([completion])[0]

    def responses(self, completions: list[Text]) -> list[list[int]]:
        texts = [c if isinstance(c, str) else "".join(m["content"] for m in c) for c in completions]
        if not texts:
            return []
        # A special token spelled out in a text stays text.
        ids = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [[*row, self.eos_id] for row in ids]

    def documents(self, texts: list[str]) -> list[list[int]]:
        """Token ids of pretraining documents, each closed by EOS."""
        if not texts:
            return []
        return [[*ids, self.eos_id] for ids in self.tokenizer(texts, split_special_tokens=True)["input_ids"]]

    def decode(self, response: list[int] | tuple[int, ...]) -> str:
        """The text of a response, up to EOS."""
        ids = list(response)
        if self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id)]
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def query_text(self, query: list[int]) -> str:
        """A query as people read it: all that the policy sees but BOS."""
        return self.tokenizer.decode(query).removeprefix(self.tokenizer.bos_token or "")

    def few_shot(self, examples: list[tuple[str, str]], prompts: list[str]) -> list[list[int]]:
        """Token ids of the paper's few-shot prefix, solved examples parted by blank lines, then the prompt (3.5)."""
        bos = self.tokenizer.bos_token or ""  # a template may open with it; a sequence has one
        shown = "".join(f"{self.render(prompt).removeprefix(bos)}{answer}\n\n" for prompt, answer in examples)
        texts = [self.render(prompt) for prompt in prompts]
        texts = [bos * text.startswith(bos) + shown + text.removeprefix(bos) for text in texts]
        return self.tokenizer(texts, add_special_tokens=self.tokenizer.chat_template is None)["input_ids"]


def fold_system(messages: list[dict]) -> list[dict]:
    """System messages put before the first question, a blank line between, for templates that know no such role."""
    system = [m["content"] for m in messages if m["role"] in ("system", "developer")]
    rest = [dict(m) for m in messages if m["role"] not in ("system", "developer")]
    if not system or not rest or rest[0]["role"] != "user":
        return messages
    rest[0]["content"] = "\n\n".join([*system, rest[0]["content"]])
    return rest


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise UserError(f"chat_template_path: {path}: cannot be read ({error}); give a Jinja file") from None


class CausalCollator:
    """{"input_ids"[, "labels"]} rows -> right-padded batch. No attention mask: nothing looks ahead at padding."""

    def __init__(self, pad_id: int):
        self.pad_id = pad_id

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        labels = [row.get("labels", row["input_ids"]) for row in rows]
        return {
            "input_ids": pad_rows([row["input_ids"] for row in rows], self.pad_id),
            "labels": pad_rows(labels, -100),
        }
