"""The one place where text becomes tokens. SFT, reward model, PPO and evaluation all come through here.

A prompt that is a conversation goes through the tokenizer's chat template with its generation prompt. A prompt that
is plain text is one user message when the tokenizer has a chat template, and is taken as it stands otherwise. A
response is the completion's own tokens followed by EOS, so a sequence trained on always starts with the sequence
sampled from, token for token.

What is learned is known from that join, never from the template: one without `{% generation %}` marks, or without a
generation prompt, masks the prompt all the same. Where a template refuses system messages or leaves them out, they
stand before the first question instead.

A special token spelled out in a prompt, completion or document stays text: only the template writes control tokens.
Each spelled-out one in a prompt is rendered as a mark; the text is then cut at the marks and what they stand for is
encoded as plain characters, so no token spans a cut.
"""

import copy
import re
import warnings
from pathlib import Path

import torch
from jinja2 import TemplateError
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from align.errors import UserError, first_line
from align.types import Text, contents, pad_rows

SYSTEM_ROLES = ("system", "developer")
# A template that writes today's date writes this one: else a run that is resumed tomorrow reads other tokens.
SAME_DAY = (
    "{%- macro strftime_now(format) -%}{{ format | replace('%Y', '2024') | replace('%m', '07') | replace('%d', '26')"
    " | replace('%B', 'July') | replace('%b', 'Jul') }}{%- endmacro -%}{{ '' }}"
)
MARK, MARK_END = "\ufdd0", "\ufdd1"  # noncharacters; a text that holds them is marked too


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
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._marked = [*sorted(special, key=len, reverse=True), MARK]
        self._spelled = re.compile("|".join(map(re.escape, self._marked)))
        self._probed: dict[tuple[str, str], bool] = {}

    @staticmethod
    def load(path: str, chat_template_path: str | None = None) -> "Codec":
        """The tokenizer of a folder or hub id; with a template in place of its own, where one is given."""
        try:
            codec = Codec(AutoTokenizer.from_pretrained(path, trust_remote_code=False), path)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path}: no tokenizer could be loaded ({first_line(error)}); give a checkpoint folder"
            ) from None
        codec._require_embeddings(path)
        if chat_template_path:
            codec.tokenizer.chat_template = _read_template(chat_template_path)
            if "question" not in codec.render("question"):
                raise UserError(f"chat_template_path: {chat_template_path}: leaves the question out; mend the template")
        return codec

    def _require_embeddings(self, path: str) -> None:
        """Raises UserError where the model beside the tokenizer has no embedding for some of its tokens."""
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        except (OSError, ValueError):  # a tokenizer alone
            return
        size = getattr(config.get_text_config(), "vocab_size", None)
        beyond = [token for token, number in self.tokenizer.get_vocab().items() if size and number >= size]
        if beyond:
            what = (
                f"its tokenizer has {len(beyond)} tokens, such as {beyond[0]!r}, beyond the model's {size} embeddings"
            )
            raise UserError(f"{path}: {what}; call resize_token_embeddings and save the model, or take them out")

    def save(self, folder: str | Path) -> None:
        self.tokenizer.save_pretrained(folder)

    def with_own_pad(self) -> "Codec":
        """One whose pad is not EOS: transformers' classifiers read the last token that is no pad. A special token,
        where there is another, so that text is still encoded as before; else any number for the model's config alone,
        which reads rows without padding."""
        if self.pad_id != self.eos_id:
            return self
        added = self.tokenizer.added_tokens_decoder.items()
        others = [token.content for i, token in added if token.special and i != self.eos_id]
        codec = Codec(copy.deepcopy(self.tokenizer))
        if others:
            named = [token for token in others if "pad" in token.lower() or token == self.tokenizer.unk_token]
            codec.tokenizer.pad_token = (named or others)[0]
            codec.pad_id = codec.tokenizer.pad_token_id
        else:
            codec.tokenizer.pad_token, codec.pad_id = None, int(self.eos_id == 0)  # who pads must say with what
        return codec

    def prompt(self, prompt: Text) -> list[int]:
        """Token ids of the query, generation prompt included."""
        return self.prompts([prompt])[0]

    def prompts(self, prompts: list[Text]) -> list[list[int]]:
        if not prompts:
            return []
        if self.tokenizer.chat_template is None:
            if not all(isinstance(prompt, str) for prompt in prompts):
                raise UserError(
                    "a prompt is a conversation but the tokenizer has no chat template; give stage sft one, "
                    "chat_template_path: FILE, which it saves with the model, or use plain text"
                )
            return self._plain(prompts)
        if any(isinstance(prompt, str) and prompt.lstrip().startswith("Human:") for prompt in prompts):
            warnings.warn(
                "prompts that begin with 'Human:' are wrapped once more, by the chat template: `align convert` makes "
                "conversations of them", stacklevel=2,
            )  # fmt: skip
        rendered = []
        for number, prompt in enumerate(prompts, start=1):
            try:
                rendered.append(self._rendered(prompt))
            except UserError as error:
                where = f"prompt {number} of {len(prompts)}: " if len(prompts) > 1 else ""
                raise UserError(f"{where}{error}") from None
        return self._encode(rendered)

    def render(self, prompt: Text) -> str:
        """The text of the query, generation prompt included; plain text as it stands without a chat template."""
        return self._unmark(self._rendered(prompt))

    def _rendered(self, prompt: Text) -> str:
        """`render`, with marks for the special tokens that its contents spell out."""
        if self.tokenizer.chat_template is None:
            return self._mark(prompt)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
        messages = [message | {"content": self._mark(message["content"])} for message in messages]
        folded = fold_system(messages)
        tries = [messages, folded] if all(self._keeps(m["role"]) for m in messages) else [folded]
        for attempt in tries:
            try:
                text = self._apply(attempt)
            except TemplateError as error:
                refusal = error
                continue
            if lost := next((m["role"] for m in attempt if not self._keeps(m["role"])), None):
                what = "a tool's answer" if lost == "tool" else "a system message that no question follows"
                raise UserError(f"the chat template leaves out {what}; mend the data or the template")
            return text
        raise UserError(f"the chat template refuses a prompt ({refusal}); mend the data or the template")

    def _keeps(self, role: str) -> bool:
        """Whether the template writes what a message of a system role, or a tool's answer, says. One that refuses the
        role may keep it elsewhere in a conversation, so only silence counts."""
        if role not in (*SYSTEM_ROLES, "tool"):
            return True
        key = str(self.tokenizer.chat_template), role
        if key not in self._probed:
            question = {"role": "user", "content": "question"}
            before = [question, {"role": "assistant", "content": "call"}] if role == "tool" else []
            probe = [*before, {"role": role, "content": MARK}, question]
            try:
                self._probed[key] = MARK in self._apply(probe)
            except TemplateError:
                self._probed[key] = True
        return self._probed[key]

    def _apply(self, messages: list[dict]) -> str:
        return self._template(messages, add_generation_prompt=True)

    def _template(self, messages: list[dict], **options: bool) -> str:
        """The template's text, of a day that stays, and with no thinking left open for an answer to lie in."""
        template = self.tokenizer.chat_template
        if isinstance(template, str) and "strftime_now" in template:
            options["chat_template"] = SAME_DAY + template
        if self._opens_thought(str(template)):
            options["enable_thinking"] = False
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)

    def _opens_thought(self, template: str) -> bool:
        """Whether a prompt ends within <think>: data without reasoning are not to be learned as reasoning."""
        if "enable_thinking" not in template:
            return False
        key = template, "<think>"
        if key not in self._probed:
            question = [{"role": "user", "content": "question"}]
            text = self.tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
            self._probed[key] = text.rstrip().endswith("<think>")
        return self._probed[key]

    def _mark(self, text: str) -> str:
        return self._spelled.sub(lambda found: f"{MARK}{self._marked.index(found[0])}{MARK_END}", text)

    def _unmark(self, text: str) -> str:
        return re.sub(f"{MARK}(\\d+){MARK_END}", lambda found: self._marked[int(found[1])], text)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of rendered texts: control tokens where a template wrote them, plain text for each mark."""
        rows = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [self._encode_marked(text) if MARK in text else row for text, row in zip(texts, rows, strict=True)]

    def _encode_marked(self, text: str) -> list[int]:
        ids = []
        for i, piece in enumerate(re.split(f"{MARK}(\\d+){MARK_END}", text)):
            spelled = i % 2 == 1
            piece = self._marked[int(piece)] if spelled else piece
            ids += self.tokenizer(piece, add_special_tokens=False, split_special_tokens=spelled)["input_ids"]
        return ids

    def _plain(self, texts: list[str]) -> list[list[int]]:
        """Token ids of texts as they stand, with what the tokenizer puts around one, but for EOS: nothing ends here."""
        rows = self.tokenizer(texts, split_special_tokens=True)["input_ids"]
        ends = self.tokenizer("a")["input_ids"][-1] == self.eos_id
        return [row[:-1] for row in rows] if ends else rows

    def response(self, completion: Text) -> list[int]:
        """Token ids of the completion, closed by EOS."""
        return self.responses([completion])[0]

    def responses(self, completions: list[Text]) -> list[list[int]]:
        texts = [contents(completion) for completion in completions]
        if not texts:
            return []
        # A special token spelled out in a text stays text.
        ids = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [[*row, self.eos_id] for row in ids]

    def documents(self, texts: list[str]) -> list[list[int]]:
        """Token ids of pretraining documents, each closed by EOS."""
        if not texts:
            return []
        return [[*ids, self.eos_id] for ids in self._plain(texts)]

    def decode(self, response: list[int] | tuple[int, ...]) -> str:
        """The text of a response, up to EOS."""
        ids = list(response)
        if self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id)]
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def query_text(self, query: list[int]) -> str:
        """A query as people read it: all that the policy sees but BOS."""
        return self.tokenizer.decode(query).removeprefix(self._opener())

    def few_shot(self, examples: list[tuple[str, str]], prompts: list[str]) -> list[list[int]]:
        """Token ids of the paper's few-shot prefix, solved examples parted by blank lines, then the prompt (3.5)."""
        opener = self._opener()  # a sequence has one, before the first example
        shown = "".join(
            f"{self._rendered(prompt).removeprefix(opener)}{self._mark(answer)}\n\n" for prompt, answer in examples
        )
        texts = [self._rendered(prompt) for prompt in prompts]
        texts = [opener * text.startswith(opener) + shown + text.removeprefix(opener) for text in texts]
        if self.tokenizer.chat_template is None:  # a tokenizer's own BOS stands before the whole
            return self._plain([self._unmark(text) for text in texts])
        return self._encode(texts)

    @property
    def start_id(self) -> int:
        """What a text stands behind where nothing is asked: BOS where it opens a sequence, else EOS."""
        return self.tokenizer.bos_token_id if self._opener() else self.eos_id

    def _opener(self) -> str:
        """BOS where it opens a sequence and nothing else: the tokenizer puts it there, or the template writes it once
        for several turns. SmolLM2's BOS, <|im_start|>, opens every turn and is part of the text."""
        bos = self.tokenizer.bos_token or ""
        if self.tokenizer.chat_template is None:
            return bos if self.tokenizer("")["input_ids"][:1] == [self.tokenizer.bos_token_id] else ""
        turns = [{"role": role, "content": "text"} for role in ("user", "assistant", "user")]
        return bos if bos and self._apply(turns).count(bos) == 1 else ""


def fold_system(messages: list[dict]) -> list[dict]:
    """System messages put before the first question, a blank line between, for templates that know no such role."""
    system = [m["content"] for m in messages if m["role"] in SYSTEM_ROLES]
    rest = [dict(m) for m in messages if m["role"] not in SYSTEM_ROLES]
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
    """{"input_ids"[, "labels"]} rows -> right-padded batch. Nothing looks ahead at padding; TRL asks for its mask."""

    def __init__(self, pad_id: int):
        self.pad_id = pad_id

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        labels = [row.get("labels", row["input_ids"]) for row in rows]
        return {
            "input_ids": pad_rows([row["input_ids"] for row in rows], self.pad_id),
            "attention_mask": pad_rows([[1] * len(row["input_ids"]) for row in rows], 0),
            "labels": pad_rows(labels, -100),
        }
