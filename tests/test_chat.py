"""Chat templates: SFT trains on what RM scores and PPO samples from, token for token, whatever the template.

The templates are those of SmolLM2-135M-Instruct (Apache-2.0) and, written anew, the shapes of other families.
"""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from align.config import SFTConfig
from align.demonstrations import demonstration_rows
from align.errors import UserError
from align.lengths import drop_long
from align.ranking import encode_rankings
from align.rows import DataReport
from align.text import Codec
from align.types import Demonstration, Prompt, Ranking

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou "
    "are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start|>' + message['role'] + '<|end|>\n\n' + "
    "message['content'] | trim + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% if loop.index0 % 2 != 0 %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token }}{% else %}{{ raise_exception('only user and assistant roles are supported') }}"
    "{% endif %}{% endfor %}"
)  # no system role, no generation prompt: an answer follows [/INST] at once
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + "
    "'<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
HH = (Path(__file__).parents[1] / "configs/hh-llama-8b/chat.jinja").read_text(encoding="utf-8")
TEMPLATES = {
    "smollm2": SMOLLM2, "chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "marked": MARKED, "hh": HH,
}  # fmt: skip
DEAF = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'Q: ' + m['content'] + '\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ 'A: ' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}{{ 'A: ' }}"
)  # leaves system messages out without a word
SPECIAL = ["<pad>", "<s>", "<|im_end|>", "<|im_start|>", "<|start|>", "<|end|>"]
REPORT = DataReport(("rows.jsonl",), 1, 1, {})


def codec_of(template: str) -> Codec:
    """Byte-level BPE, so that merges may run across the edge of query and response where the text would allow it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["assistant\n\nuser\nsystem\n the answer is no", "\n\n\n\n a a b", "问题 回答"], trainer
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="<|im_end|>",
        additional_special_tokens=SPECIAL[3:],
    )  # fmt: skip
    fast.chat_template = template
    return Codec(fast)


CODECS = {name: codec_of(template) for name, template in TEMPLATES.items()}
every_template = pytest.mark.parametrize("name", TEMPLATES)
words = st.text(st.sampled_from("ab n\n'问é!"), min_size=1, max_size=12).filter(lambda text: text.strip())


@st.composite
def conversations(draw, system: bool = True):
    """A question, or several turns that end with one; maybe a system message first; or plain text."""
    turns = draw(st.integers(0, 2))
    messages = []
    if system and draw(st.booleans()):
        messages.append({"role": "system", "content": draw(words)})
    for _ in range(turns):
        messages += [{"role": "user", "content": draw(words)}, {"role": "assistant", "content": draw(words)}]
    messages.append({"role": "user", "content": draw(words)})
    return messages[0]["content"] if len(messages) == 1 and draw(st.booleans()) else tuple(messages)


def sft_row(codec: Codec, prompt, completion) -> dict:
    return demonstration_rows([Demonstration(prompt, completion)], codec, 10_000, REPORT)[0][0]


@every_template
@given(prompt=conversations(), answers=st.lists(words, min_size=2, max_size=3, unique_by=str.strip))
def test_S2_training_text_starts_with_its_generation_prompt_in_every_stage(name, prompt, answers):
    """SFT's row, the reward model's rows and what PPO samples from agree token for token."""
    codec = CODECS[name]
    query = codec.prompt(prompt)  # what PPO, collect and evaluate sample from
    row = sft_row(codec, prompt, answers[0])
    ranked = encode_rankings([Ranking(prompt, tuple(answers), tuple(map(float, range(len(answers)))))], codec)
    assert row["input_ids"][: len(query)] == query == list(ranked[0]["ranking"].query)
    for answer, response in zip(answers, ranked[0]["ranking"].responses, strict=True):
        assert sft_row(codec, prompt, answer)["input_ids"] == query + list(response)
        assert codec.decode(response) == answer and response[-1] == codec.eos_id


@every_template
@given(prompt=conversations(), answer=words)
def test_S2_the_loss_is_on_the_response_alone_with_or_without_generation_marks(name, prompt, answer):
    row = sft_row(CODECS[name], prompt, answer)
    response = len(CODECS[name].response(answer))
    assert row["completion_mask"] == [0] * (len(row["input_ids"]) - response) + [1] * response
    assert 2 <= response < len(row["input_ids"])


@every_template
@given(prompt=conversations(system=False))
def test_the_query_is_the_templates_own_rendering(name, prompt):
    """By transformers' own path to tokens; a text is one user message."""
    codec = CODECS[name]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    ids = codec.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert codec.prompt(prompt) == ids["input_ids"]
    assert codec.prompt(prompt).count(codec.tokenizer.bos_token_id) == int("bos_token" in TEMPLATES[name])


@every_template
@given(prompt=conversations(), answer=words)
def test_a_whole_conversation_renders_as_query_and_response(name, prompt, answer):
    """The template's text of question and answer opens with ours, up to white space that it trims."""
    codec = CODECS[name]
    answer = answer.strip()
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    if name == "mistral" and messages[0]["role"] == "system":
        system = messages.pop(0)["content"]
        messages[0]["content"] = f"{system}\n\n{messages[0]['content']}"
    whole = codec.tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": answer}], tokenize=False)
    ours = codec.tokenizer.decode(sft_row(codec, prompt, answer)["input_ids"], skip_special_tokens=False)
    assert whole.startswith(ours) and whole[len(ours) :].strip() == ""


@every_template
@given(prompt=conversations(system=False), answer=words, again=words)
def test_the_next_question_goes_on_from_what_was_trained_on(name, prompt, answer, again):
    codec = CODECS[name]
    answer = answer.strip()
    messages = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
    longer = (*messages, {"role": "assistant", "content": answer}, {"role": "user", "content": again})
    trained = codec.tokenizer.decode(sft_row(codec, prompt, answer)["input_ids"], skip_special_tokens=False)
    assert codec.render(longer).startswith(trained)
    if name == "hh":  # token for token, as a history is what was sampled
        row = sft_row(codec, prompt, answer)["input_ids"]
        assert codec.prompt(longer)[: len(row)] == row


@every_template
@given(before=words, token=st.sampled_from(SPECIAL), after=words)
def test_a_special_token_spelled_out_in_a_prompt_stays_text(name, before, token, after):
    """Only the template writes control tokens: as many with such a prompt as without."""
    codec = CODECS[name]
    special = set(codec.tokenizer.all_special_ids)
    spelled, harmless = f"x{before}{token}{after}x", f"x{before}{after}x"
    history = ({"role": "user", "content": spelled}, {"role": "assistant", "content": spelled})
    for wrap in (lambda text: text, lambda text: (*history, {"role": "user", "content": text})):
        prompt = wrap(spelled)
        ids = codec.prompt(prompt)
        assert codec.tokenizer.decode(ids, skip_special_tokens=False) == codec.render(prompt)
        plain = codec.prompt(
            [{**m, "content": harmless} for m in prompt] if isinstance(prompt, tuple) else wrap(harmless)
        )
        assert [i for i in ids if i in special] == [i for i in plain if i in special]
        assert sft_row(codec, prompt, "yes")["input_ids"][: len(ids)] == ids


@pytest.mark.parametrize("name", ["chatml", "smollm2", "llama3"])
def test_few_shot_keeps_what_opens_each_turn(name):
    """BOS that is a turn's own token stays before every example; one that opens the sequence stands there once."""
    codec = codec_of(TEMPLATES[name])
    if name != "llama3":
        codec.tokenizer.bos_token = "<|im_start|>"  # as SmolLM2's
    (ids,) = codec.few_shot([("a", "b <s>"), ("n", "no")], ["?"])
    shown = [codec.render(prompt) for prompt in ("a", "n", "?")]
    if name == "llama3":
        shown[1:] = [text.removeprefix("<s>") for text in shown[1:]]
    assert codec.tokenizer.decode(ids) == f"{shown[0]}b <s>\n\n{shown[1]}no\n\n{shown[2]}"
    assert ids.count(codec.tokenizer.bos_token_id) == "".join(shown).count(codec.tokenizer.bos_token)
    query = codec.prompt("a")
    assert codec.query_text(query) == shown[0].removeprefix("<s>")


def test_a_system_message_goes_before_the_question_where_the_template_knows_no_system():
    system, question = {"role": "system", "content": "be brief"}, {"role": "user", "content": "why?"}
    assert CODECS["mistral"].render((system, question)) == "<s>[INST] be brief\n\nwhy? [/INST]"
    assert "system\nbe brief" in CODECS["smollm2"].render((system, question))
    assert "SmolLM" in CODECS["smollm2"].render((question,)) and "SmolLM" not in CODECS["smollm2"].render(
        (system, question)
    )


def test_a_system_message_that_the_template_leaves_out_goes_before_the_question():
    codec = codec_of(DEAF)
    system, question = {"role": "system", "content": "be brief"}, {"role": "user", "content": "why?"}
    assert codec.render((system, question)) == "Q: be brief\n\nwhy?\nA: "
    assert codec.render(({**system, "role": "developer"}, question)) == "Q: be brief\n\nwhy?\nA: "
    assert codec.render((question,)) == "Q: why?\nA: "
    with pytest.raises(UserError, match="leaves out a system message"):
        codec.render((system, {"role": "assistant", "content": "yes?"}, question))


def test_a_tools_answer_that_the_template_leaves_out_is_not_lost_in_silence():
    asked = {"role": "user", "content": "how warm?"}, {"role": "assistant", "content": "I look it up."}
    told = {"role": "tool", "content": "21 degrees"}
    assert "21 degrees" in CODECS["chatml"].render((*asked, told))
    with pytest.raises(UserError, match="leaves out a tool's answer"):
        codec_of(DEAF).render((*asked, told))


def test_an_answer_of_several_messages_has_blank_lines_between_them():
    said = tuple({"role": "assistant", "content": text} for text in ("Hello.", "And bye."))
    assert CODECS["chatml"].response(said) == CODECS["chatml"].response("Hello.\n\nAnd bye.")


def test_what_a_template_refuses_is_one_line():
    twice = ({"role": "user", "content": "a"}, {"role": "user", "content": "b"})
    with pytest.raises(UserError, match="refuses a prompt .*roles must alternate"):
        CODECS["mistral"].prompt(twice)
    with pytest.raises(UserError, match="refuses a prompt"):
        CODECS["mistral"].prompt(({"role": "system", "content": "s"}, *twice))
    with pytest.raises(UserError, match="prompt 2 of 3: the chat template refuses a prompt"):
        CODECS["mistral"].prompts(["a", twice, "b"])
    report = DataReport(("file.jsonl",), 2, 2, {})
    with pytest.raises(UserError, match="file.jsonl: row 2 of 2 in use: the chat template refuses a prompt"):
        drop_long([Prompt("a"), Prompt(twice)], CODECS["mistral"], 9, report)


def test_dialogues_in_a_string_are_warned_of():
    """As a user's message, 'Human: ...' would be wrapped twice."""
    with pytest.warns(UserWarning, match="`align convert` makes conversations of them"):
        CODECS["chatml"].prompt("\n\nHuman: hot\n\nAssistant:")


def test_a_template_of_the_users_own_is_saved_with_the_policy(tmp_path):
    folder, template = tmp_path / "model", tmp_path / "chat.jinja"
    CODECS["chatml"].tokenizer.save_pretrained(folder)
    template.write_text(
        "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] }}{% endfor %}", encoding="utf-8"
    )
    codec = Codec.load(str(folder), str(template))
    assert codec.render("hi") == "[user] hi"
    codec.save(tmp_path / "saved")
    assert Codec.load(str(tmp_path / "saved")).render("hi") == "[user] hi"
    with pytest.raises(UserError, match="chat_template_path: .*cannot be read"):
        Codec.load(str(folder), str(tmp_path / "missing.jinja"))
    template.write_text("nothing", encoding="utf-8")
    with pytest.raises(UserError, match="leaves the question out"):
        Codec.load(str(folder), str(template))
    template.write_text("{% for", encoding="utf-8")
    with pytest.raises(UserError, match="refuses a prompt"):
        Codec.load(str(folder), str(template))
    assert SFTConfig(output_dir="o").chat_template_path is None
