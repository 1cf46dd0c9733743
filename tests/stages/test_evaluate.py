"""What stages/evaluate.py measures, and of which policy: two tiny policies of random weights, a function as reward."""

import json
import math
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from align.generate import uniform_numbers
from align.manifest import write_manifest
from align.types import Ranking
from stages.evaluate import judges_report, main, step_zero

MARKS = """
from types import SimpleNamespace

def mark(row, response, finished):
    likert = 1 + (len(row["prompt"]) + sum(map(ord, response)) + finished) % 7
    return SimpleNamespace(likert=likert, as_dict=lambda: {"likert": likert})
"""
TEXT = "Write a short story about a fox and a boat. 用中文说出三种水果。"


@pytest.fixture
def evaluation_of(tmp_path, tiny_codec, monkeypatch):
    """Runs the stage on policies of a context of so many tokens, and reads what it wrote."""
    (tmp_path / "lengths.py").write_text(
        "def length(completions, **columns):\n    return list(map(len, completions))\n"
    )
    (tmp_path / "marks.py").write_text(MARKS)
    monkeypatch.syspath_prepend(str(tmp_path))

    def policy(name, context):
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        tokens = {"bos_token_id": None, "eos_token_id": tiny_codec.eos_id, "pad_token_id": tiny_codec.pad_id}
        limits = {"vocab_size": len(tiny_codec.tokenizer), "max_position_embeddings": context}
        model = LlamaForCausalLM(LlamaConfig(**limits, **sizes, **tokens))
        with torch.no_grad():
            model.lm_head.weight.mul_(20)  # what it says depends on what it read
        model.save_pretrained(tmp_path / name)
        tiny_codec.save(tmp_path / name)

    def written(name, rows):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    def run(context, more=None, **files):
        torch.manual_seed(0)
        for name in ("base", "sft", "ppo"):
            policy(name, context)
        keys = {"run_dir": tmp_path, "output_dir": tmp_path / "report", "sft_path": tmp_path / "sft"}
        keys |= {"reward_model_path": "null", "reward_function": "lengths:length", "max_new_tokens": 4}
        keys |= {name: written(name, rows) for name, rows in files.items() if name.endswith("_file")}
        keys |= {name: tmp_path / folder for name, folder in files.items() if name.endswith("_path")}
        keys |= more or {}
        main([word for key, value in keys.items() for word in (f"--{key}", str(value))])
        return json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))

    return run


def perplexity_of(folder, ids: list[int]) -> float:
    """By transformers' own loss, the mean over all tokens but the first."""
    ids = torch.tensor([ids])
    with torch.no_grad():
        return math.exp(float(AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids, labels=ids).loss))


def test_every_policy_speaks_for_itself(evaluation_of, tiny_codec, tmp_path):
    """The prompted one is base that has read the solved examples; perplexity is of each policy's own weights."""
    prompts = [{"prompt": "Name three animals."}, {"prompt": "Which word is the opposite of hot?"}]
    shown = [{"prompt": "Name a fox.", "completion": "a dog"}]
    files = {"prompts_file": prompts, "few_shot_file": shown, "text_file": [{"text": TEXT}], "base_path": "base"}
    measured = evaluation_of(context=128, **files)["policies"]
    for mode in ("sampled", "greedy"):
        said = {name: [row["response"] for row in measured[name][mode]] for name in ("base", "prompted", "sft")}
        assert said["base"] != said["prompted"] and said["base"] != said["sft"], mode
    (ids,) = tiny_codec.documents([TEXT])
    base, sft = (perplexity_of(tmp_path / name, ids) for name in ("base", "sft"))
    assert abs(base - sft) > 1
    found = [measured[name]["perplexity"] for name in ("base", "prompted", "sft")]
    assert found == pytest.approx([base, base, sft], rel=1e-4)


def test_what_a_short_context_cannot_hold_is_left_out(evaluation_of, tiny_codec, tmp_path, capsys):
    """Of 20 tokens 4 are an answer's and 1 its EOS, so 15 a prompt's; a ranking may have 20, and 20 of a text are read.
    An x, y or z is a token, and a newline ends a prompt, EOS a completion."""
    prompts = [{"prompt": "x" * n} for n in (2, 14, 15)]
    assert [len(tiny_codec.prompt(row["prompt"])) for row in prompts] == [3, 15, 16]
    rankings = [
        {"prompt": "z" * 9, "completions": [{"completion": "y" * n, "rank": 0}, {"completion": "no", "rank": 1}]}
        for n in (9, 10)
    ]
    assert [len(tiny_codec.response("y" * n)) for n in (9, 10)] == [10, 11]
    (ids,) = tiny_codec.documents([TEXT])
    assert len(ids) > 20
    files = {"prompts_file": prompts, "rankings_file": rankings, "text_file": [{"text": TEXT}]}
    evaluation = evaluation_of(context=20, **files)
    sft = evaluation["policies"]["sft"]
    assert [[row["prompt"] for row in sft[mode]] for mode in ("sampled", "greedy")] == [["xx", "x" * 14]] * 2
    assert evaluation["rm"]["pairs"] == 1
    assert sft["perplexity"] == pytest.approx(perplexity_of(tmp_path / "sft", ids[:20]), rel=1e-4)
    told = capsys.readouterr().out
    assert "1 of 3 rows over 15 tokens left out" in told and "1 of 2 rows over 20 tokens left out" in told


def test_the_reward_models_own_number_of_demonstrations_is_reported(tiny_codec, tmp_path):
    """That of the model as it was written, not from before its bias was set."""
    numbers = {"demonstration_mean_before": 0.75, "demonstration_mean": 0.25}
    (tmp_path / "rm").mkdir()
    write_manifest(tmp_path / "rm", "rm", {}, seed=0, metrics=numbers)
    setting = SimpleNamespace(reward=lambda prompts, episodes: [1.0, 2.0], codec=tiny_codec, judge=None)
    config = SimpleNamespace(reward_model_path=str(tmp_path / "rm"), seed=0)
    report = judges_report(config, setting, [Ranking("Name a pet.", ("a cat", "no"), (0, 1))])
    assert report["rm"]["demonstration_mean"] == 0.25 and report["rm"]["gold_accuracy"] is None


def test_step_zero_is_of_ppo_ptx_where_both_were_trained(tmp_path):
    numbers = {name: {"kl": kl} for name, kl in (("ppo", 0.5), ("ppo_ptx", 0.125))}
    for name, zero in numbers.items():
        (tmp_path / name).mkdir()
        write_manifest(tmp_path / name, "ppo", {}, seed=0, metrics={"step_zero": zero})
    ppo, ptx = str(tmp_path / "ppo"), str(tmp_path / "ppo_ptx")

    def found(ppo_path, ppo_ptx_path):
        return step_zero(SimpleNamespace(ppo_path=ppo_path, ppo_ptx_path=ppo_ptx_path))

    assert found(ppo, ptx) == {"kl": 0.125}
    assert found(ppo, None) == found(ppo, str(tmp_path / "not trained")) == {"kl": 0.5} and found(None, None) is None


def answers_token_by_token(folder, codec, prompt: str, uniforms, temperature: float) -> list[tuple[str, bool]]:
    """By transformers' whole forward pass a token: one answer a row of uniform numbers, and whether it ended."""
    model, answers = AutoModelForCausalLM.from_pretrained(folder), []
    for row in uniforms:
        ids, response = codec.prompt(prompt), []
        while len(response) < len(row) and codec.eos_id not in response:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*ids, *response]])).logits[0, -1]
            below = (logits.double() / temperature).softmax(0).cumsum(0)
            response.append(int((below <= row[len(response)]).sum()))
        answers.append((codec.decode(response), codec.eos_id in response))
    return answers


def test_best_of_n_of_sft_beside_ppo(evaluation_of, tiny_codec, tmp_path):
    """Every answer is drawn and scored again by plain loops; all that was measured before is as without the key."""
    prompts = ["Name three animals.", "Which word is the opposite of hot?", "Say x."]
    files = {"prompts_file": [{"prompt": prompt} for prompt in prompts], "text_file": [{"text": TEXT}]}
    more = {"judge": "marks:mark", "temperature": 0.7}
    found = [evaluation_of(128, more | best_of, ppo_path="ppo", **files) for best_of in ({}, {"best_of": 4})]
    for evaluation in found:
        del evaluation["seconds"]
    best = found[1].pop("best_of_n")
    assert found[0].pop("best_of_n") is None and found[0] == found[1]

    expected = {"proxy": [], "gold": []}
    for i, prompt in enumerate(prompts):
        uniforms = torch.stack([uniform_numbers(len(prompts), 4, 0, 1, k)[i] for k in range(4)])
        drawn = answers_token_by_token(tmp_path / "sft", tiny_codec, prompt, uniforms, temperature=0.7)
        expected["proxy"].append([len(answer) for answer, _ in drawn])
        expected["gold"].append([1 + (len(prompt) + sum(map(ord, answer)) + end) % 7 for answer, end in drawn])
    assert best["scores"] == expected and len({x for row in expected["proxy"] for x in row}) > 2
    assert (best["samples"], best["prompts"]) == (4, 3) and [row["n"] for row in best["curve"]] == [1, 2, 4]
    for row in best["curve"]:
        for key, scores in expected.items():
            kept = [score_of_best(*pair, row["n"]) for pair in zip(expected["proxy"], scores, strict=True)]
            assert row[key]["mean"] == pytest.approx(sum(kept) / 3) and row[key]["low"] < row[key]["mean"]

    (beside,), records = best["policies"].values(), found[1]["policies"]["ppo"]["sampled"]
    assert beside["kl"]["mean"] == pytest.approx(sum(row["kl"] for row in records) / 3)
    assert beside["n"] == 4 and beside["kl"]["mean"] > beside["kl_of_n"]  # it has weights of its own: far away
    for key, name in (("proxy", "proxy"), ("gold", "likert")):
        kept = [score_of_best(*pair, 4) for pair in zip(expected["proxy"], expected[key], strict=True)]
        assert beside[key]["gain"]["mean"] == pytest.approx(sum(row[name] for row in records) / 3 - sum(kept) / 3)
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert "plots/best_of_n.png" in page and (tmp_path / "report" / "plots" / "best_of_n.png").is_file()
    assert "of 4 (at most 0.64 nats)" in page and "best_of_n" not in json.loads((tmp_path / "summary.json").read_text())


def score_of_best(proxy: list[float], scores: list[float], n: int) -> float:
    """Mean over the sets of n answers of the score of the one of highest proxy, of tied ones their mean."""
    kept = []
    for drawn in combinations(zip(proxy, scores, strict=True), n):
        best = [score for value, score in drawn if value == max(value for value, _ in drawn)]
        kept.append(sum(best) / len(best))
    return sum(kept) / len(kept)
