"""benchmarks/: the work both sides are given, the file of results, growth and its plots."""

import gzip
import importlib
import json
import re
import sys
from argparse import Namespace
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from align.config import BaseConfig
from align.demonstrations import demonstration_rows
from align.errors import UserError
from align.models import ScalarModel
from align.ranking import encode_rankings, split_pairs
from align.rows import DataReport
from align.text import Codec
from align.types import Demonstration, Ranking
from benchmarks import __main__ as command_line
from benchmarks import compare, growth, memory, ours, profiling, workloads
from stages.base import llama_config, train_tokenizer

FOLDER = Path(compare.__file__).parent
RESULTS = FOLDER / "results.json"
FIELDS = {"workload", "ours", "peer", "unit", "ratio", "ratio_low", "ratio_high", "memory_ratio", "limit_fraction"}
FIELDS |= {"date", "machine"}


@pytest.fixture(scope="module")
def codec():
    return Codec(train_tokenizer(["the cat eats fish .", "a dog runs home", "what is red ?"], 300))


# The work


def test_toy_size_is_the_same_work_on_preset_tinys_model():
    names = {"ppo-fixed", "ppo-ragged", "sampling-ragged", "rm-hh", "rm-qa", "sft"}
    everything = names | {f"toy-{name}" for name in names} | set(workloads.GPU_WORKLOADS)
    assert set(workloads.WORKLOADS) == everything and workloads.GPU_WORKLOADS.keys() <= {
        f"gpu-{name}" for name in names
    }
    for name in names:
        toy = workloads.WORKLOADS[f"toy-{name}"]
        assert toy["model"] == "0.7M" and toy | {"model": "135M"} == workloads.WORKLOADS[name]
    tiny = BaseConfig(output_dir="x")
    assert all(getattr(tiny, key) == value for key, value in workloads.MODELS["0.7M"].items())


def test_both_sides_can_run_every_workload(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    sides = importlib.import_module("benchmarks.ours"), importlib.import_module("peer")
    runners = {"ppo": "ppo", "rm": "reward", "sampling": "sampling", "sft": "fine_tuning"}
    for spec in workloads.SPECS.values():
        assert all(callable(getattr(side, runners[spec["kind"]])) for side in sides)
        assert spec["kind"] in workloads.FLOPS and spec["model"] in {*workloads.MODELS, workloads.SMOLLM2}
        if spec["kind"] == "ppo":  # batches are whole on both sides
            assert spec["episodes"] % spec["batch"] == 0 and spec["batch"] % spec["minibatches"] == 0


def test_model_axis_tells_the_models_sizes(codec):
    for millions, spec in workloads.GROWTH["model"].items():
        if spec["model"] != workloads.SMOLLM2:
            sizes = workloads.MODELS[spec["model"]]
            config = llama_config(BaseConfig(output_dir="x", **sizes), codec)
            config.vocab_size = sizes["vocab_size"]
            with torch.device("meta"):
                count = sum(p.numel() for p in LlamaForCausalLM(config).parameters())
            assert count / 1e6 == pytest.approx(millions, rel=0.01)


def test_growth_covers_what_it_says():
    axes = workloads.GROWTH
    assert list(axes["length"]) == [32, 64, 128, 256, 512] and list(axes["batch"]) == [16, 32, 64, 128, 256]
    assert min(axes["k"]) == 2 and max(axes["k"]) == 9
    for specs in axes.values():
        assert list(specs) == sorted(specs)  # from small to large: a process's peak memory is its last point's
        assert len({spec["kind"] for spec in specs.values()}) == 1


def test_random_queries_are_the_same_each_time():
    queries = workloads.random_queries(3, 32, 40_000)
    assert queries == workloads.random_queries(3, 32, 40_000) and [len(query) for query in queries] == [32, 32, 32]
    assert queries[0] != queries[1] and all(10 <= token < 40_000 for query in queries for token in query)


def test_queries_fit_the_models_vocabulary():
    for name, sizes in workloads.MODELS.items():
        drawn = workloads.queries(Path("none"), None, workloads.FIXED | {"model": name})
        assert len(drawn) == 64 and max(map(max, drawn)) < sizes["vocab_size"]


def test_hh_pairs_share_their_prompt(tmp_path):
    (tmp_path / "hh-rlhf").mkdir()
    head = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: why?\n\nAssistant:"
    with gzip.open(tmp_path / workloads.FILES["hh"], "wt", encoding="utf-8") as file:
        file.write(json.dumps({"chosen": head + " because", "rejected": head + " no idea"}) + "\n")
    (row,) = workloads.load_rankings(tmp_path, workloads.WORKLOADS["rm-hh"])
    assert row == {"prompt": head, "answers": [" because", " no idea"], "ranks": [1, 2]}
    assert workloads.pairs_of([row]) == [{"prompt": head, "chosen": " because", "rejected": " no idea"}]


def test_both_sides_train_on_the_pairs_whose_ranks_differ(tmp_path, codec):
    (tmp_path / "qa-feedback").mkdir()
    row = {"passages": [["a", "b"], "c"], "question": "q", "preference": [1, 2, 0, 2, 1, 1]}
    row |= {f"prediction {i}": f"p{i}" for i in (1, 2, 3, 4)}
    (tmp_path / workloads.FILES["qa"]).write_text(json.dumps([row]), encoding="utf-8")
    (ranking,) = workloads.load_rankings(tmp_path, workloads.WORKLOADS["toy-rm-qa"])
    assert ranking["prompt"] == "a b\nc\n\nQuestion: q\nAnswer: "
    # (1,2): 1; (1,3): 3; (1,4): tie; (2,3): 3; (2,4): 2; (3,4): 3. Losses minus wins of each answer:
    assert ranking["ranks"] == [1 - 1, 2 - 1, 0 - 3, 2 - 0]
    # Ranks 0, 1, -3, 2: the pair that was judged a tie has its order too.
    pairs = [(pair["chosen"], pair["rejected"]) for pair in workloads.pairs_of([ranking])]
    assert pairs == [("p1", "p2"), ("p3", "p1"), ("p1", "p4"), ("p3", "p2"), ("p2", "p4"), ("p3", "p4")]
    assert len(trained_pairs(ranking, codec)) == 6
    tied = ranking | {"ranks": [0, 1, 0, 1]}
    pairs = [(pair["chosen"], pair["rejected"]) for pair in workloads.pairs_of([tied])]
    assert pairs == [("p1", "p2"), ("p1", "p4"), ("p3", "p2"), ("p3", "p4")]
    assert len(trained_pairs(tied, codec)) == 4


def trained_pairs(row: dict, codec: Codec) -> list[dict]:
    """Of a row of `workloads.load_rankings`, by our reward model's code."""
    ranking = Ranking(row["prompt"], tuple(row["answers"]), tuple(map(float, row["ranks"])))
    return split_pairs(encode_rankings([ranking], codec))


def test_operations_by_hand():
    """Width 8, one layer: attention 4 x 8 x 8, feed-forward 3 x 8 x 12, three norms of 8, a vocabulary of 50."""
    sizes = {"vocab_size": 50, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True, num_labels=1)
    trunk, embedding, head = 256 + 288 + 24, 400, 8
    policy, scalar = LlamaForCausalLM(config), ScalarModel(LlamaForSequenceClassification(config), packed=False)
    # PPO: sampled 2, reference 2, reward 2, value 2, policy trained 6, value model trained 6.
    assert ours.operations({"kind": "ppo"}, policy, 3) == {"tokens": 3, "flops": 3 * 20 * (trunk + embedding)}
    assert ours.operations({"kind": "sft"}, policy, 3)["flops"] == 3 * 6 * (trunk + embedding)
    assert ours.operations({"kind": "sampling"}, policy, 3)["flops"] == 3 * 2 * (trunk + embedding)
    assert ours.operations({"kind": "rm"}, scalar, 3)["flops"] == 3 * 6 * (trunk + head)


def least_model(tmp_path, codec) -> Path:
    sizes = {"vocab_size": len(codec.tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    config = llama_config(BaseConfig(output_dir="x", num_attention_heads=2, **sizes), codec)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    codec.save(tmp_path / "model")
    return tmp_path / "model"


def test_our_side_counts_the_work_it_did(tmp_path, codec, monkeypatch):
    """2 rollouts x 2 minibatches: 4 optimiser steps. 2 prompts with 3 answers: 6 pairs."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setitem(workloads.MODELS, "least", {"vocab_size": len(codec.tokenizer)})
    folder = least_model(tmp_path, codec)
    spec = workloads.FIXED | {"model": "least", "episodes": 8, "batch": 4, "new_tokens": 3}
    taken = ours.ppo(spec, folder, tmp_path, str(tmp_path / "ppo"), {"bf16": False})
    assert taken["work"] == {"episodes": 8, "steps": 4} and 8 <= taken["response_tokens"] <= 8 * 3
    assert taken["tokens"] == taken["response_tokens"] + 8 * 32
    spec = workloads.ranked(3) | {"model": "least", "count": 2}
    taken = ours.reward(spec, folder, tmp_path, str(tmp_path / "rm"), {"bf16": False})
    assert taken["work"] == {"pairs": 6} and taken["unit"] == "pairs/s"


def test_a_profile_has_each_phase_before_and_after(tmp_path, codec, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr("benchmarks.profiling.has_bf16", lambda: False)
    spec = workloads.FIXED | {"model": "least", "episodes": 4, "batch": 4, "new_tokens": 3}
    monkeypatch.setattr(profiling, "SPEC", spec)
    monkeypatch.setitem(workloads.MODELS, "least", {"vocab_size": len(codec.tokenizer)})
    profiling.main(str(least_model(tmp_path, codec)), str(tmp_path), str(tmp_path / "profile.md"))
    text = (tmp_path / "profile.md").read_text(encoding="utf-8")
    phases, *operations = [re.findall(r"^\| (.+) \|$", part, re.MULTILINE)[2:] for part in text.split("## ")]
    rows = {cells[0]: [float(cell) for cell in cells[1:]] for cells in (line.split(" | ") for line in phases)}
    assert {"sample", "reference", "reward", "value", "update policy", "update value", "all"} <= set(rows)
    for column in (0, 1):
        total = sum(row[column] for name, row in rows.items() if name != "all")
        assert rows["all"][column] == pytest.approx(total, abs=0.05)
    profiled = re.findall(r"^## (.+), (padded rows|packs)$", text, re.MULTILINE)
    slowest = profiled[0][0]  # of rounded seconds others may have as many
    assert profiled == [(slowest, "padded rows"), (slowest, "packs")]
    assert rows[slowest][0] == max(row[0] for name, row in rows.items() if name != "all")
    for lines in operations:
        cells = [line.split(" | ") for line in lines]
        assert len(cells) == 12 and all(int(calls.replace(",", "")) > 0 for _, calls, _, _ in cells)
        assert sum(int(share.rstrip("%")) for *_, share in cells) <= 106  # each rounded


def test_peers_optimiser_steps_are_those_it_took(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    peer = importlib.import_module("peer")
    model = torch.nn.Linear(2, 1)
    optimiser = torch.optim.AdamW(model.parameters())
    assert peer.steps_taken(optimiser) == 0
    for _ in range(3):
        model(torch.ones(2)).backward()
        optimiser.step()
    assert peer.steps_taken(optimiser) == 3


def test_bytes_of_each_memory_key_by_hand(tmp_path, monkeypatch):
    """One layer of width 64 in float32: embeddings 8192 x 64, attention 4 x 64 x 64, feed-forward 3 x 64 x 170, three
    norms; the head of 65. LoRA of rank 16 on the seven matrices."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    paths = memory.make_models(tmp_path, hidden=64, layers=1)
    matrices = 4 * 64 * 64 + 3 * 64 * 170
    trunk, adapter = 8192 * 64 + matrices + 3 * 64, 16 * (4 * 128 + 3 * 234)
    plain = ("bf16=false", "total_episodes=2", "rollout_batch_size=2", "gradient_checkpointing=false")
    monkeypatch.setattr(memory, "EPISODES", 2)
    measured = {
        keys: memory.measure(*paths, *plain, *keys)
        for keys in ((), ("use_peft=true", "value_use_peft=true"), ("frozen_quantization=int8", "ema_decay=null"))
    }
    full, lora, rounded = measured.values()
    buffers = full["weights"] - 4 * (4 * trunk + 2 * 65)  # rotary frequencies
    assert 0 <= buffers < 4 * 4 * 100
    assert full["gradients"] == 4 * (trunk + 65) and full["average"] == 4 * trunk
    assert lora["gradients"] == 4 * (adapter + 65) and lora["average"] == 4 * adapter
    assert lora["weights"] == 4 * (2 * trunk + 2 * 65 + 2 * adapter) + buffers // 2
    steps = 4 * 2 * (20 + 14 + 14)  # at most: a step count a tensor
    assert 0 <= full["optimiser"] - 4 * 2 * (2 * trunk + 65) < steps
    assert 0 <= lora["optimiser"] - 4 * 2 * (2 * adapter + 65) < steps
    scales = 4 * (4 * 64 + 2 * 170 + 64)
    assert full["weights"] - rounded["weights"] == 2 * (3 * matrices - scales) and rounded["average"] == 0


def test_k_answers_make_all_their_pairs():
    for k, pairs in ((2, 1), (3, 3), (5, 10), (9, 36)):
        rows = workloads.load_rankings(Path("none"), workloads.GROWTH["k"][k])
        assert len(rows) == 8 and len(workloads.pairs_of(rows)) == 8 * pairs
        for row in rows:
            assert len(set(row["answers"])) == len(set(row["ranks"])) == k


def test_demonstrations_are_the_best_replies_that_are_short(tmp_path):
    trees = [("a", "long " * 500, 0), ("b", "best b", 0), ("c", "second", 1), ("d", "best d", 0)]
    (tmp_path / "oasst-en").mkdir()
    rows = [{"prompt": {"text": p, "replies": [{"text": t, "rank": r}, {"text": "unranked"}]}} for p, t, r in trees]
    (tmp_path / workloads.FILES["oasst-trees"]).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    train, held_out = workloads.demonstrations(tmp_path, {"source": "oasst-trees", "count": 1, "held_out": 1})
    assert train == [{"prompt": "b", "completion": "best b"}]
    assert held_out == [{"prompt": "d", "completion": "best d"}]


def test_peer_is_given_the_tokens_that_our_stage_makes(codec):
    rows = [{"prompt": "what is red ?", "completion": " a cat"}, {"prompt": "dog", "completion": "fish\n"}]
    ours, _ = demonstration_rows([Demonstration(**row) for row in rows], codec, 99, DataReport(("x",), 2, 2, {}))
    assert [workloads.demonstration_tokens(codec.tokenizer, row) for row in rows] == ours


# The results


@pytest.mark.parametrize("file", command_line.RESULTS.values())
def test_results_name_each_workload_once_with_its_fields(file):
    entries = json.loads((FOLDER / file).read_text(encoding="utf-8"))
    names = [entry["workload"] for entry in entries]
    assert names == sorted(set(names)) and set(names) <= workloads.WORKLOADS.keys()
    for entry in entries:
        assert entry.keys() >= FIELDS
        assert 0 < entry["ratio_low"] <= entry["ratio"] + 1e-12 and entry["ratio"] <= entry["ratio_high"] + 1e-12
        rates = [(a["rate"], b["rate"]) for a, b in zip(entry["runs"]["ours"], entry["runs"]["peer"], strict=True)]
        assert entry["ours"] == pytest.approx(sum(a for a, _ in rates) / len(rates))
        assert entry["ratio_high"] == pytest.approx(max(a / b for a, b in rates))
        shares = [run["flops"] / run["seconds"] / (1e9 * entry["limit_gflops"]) for run in entry["runs"]["ours"]]
        assert entry["limit_fraction"] == pytest.approx(sum(shares) / len(shares))


# 30 layers of q, o 576 x 576, k, v 576 x 192, feed-forward 3 x 576 x 1536 and two norms; the last norm.
TRUNK = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536 + 2 * 576) + 576
WEIGHTS = {"rm": TRUNK + 576 + 1}  # the head and its bias; a policy's embedding is its output layer too


@pytest.mark.parametrize("file", command_line.RESULTS.values())
def test_results_count_smollm2s_operations(file):
    for entry in json.loads((FOLDER / file).read_text(encoding="utf-8")):
        spec = workloads.WORKLOADS[entry["workload"]]
        if spec["model"] == workloads.SMOLLM2:
            a_token = workloads.FLOPS[spec["kind"]] * WEIGHTS.get(spec["kind"], TRUNK + 49152 * 576)
            assert all(run["flops"] == a_token * run["tokens"] for run in entry["runs"]["ours"])


@pytest.mark.parametrize(("readme", "heading"), [("README.md", "## Speed\n"), ("README.zh-CN.md", "## 速度\n")])
def test_readmes_speed_table_is_results_json(readme, heading):
    entries = [e for e in json.loads(RESULTS.read_text(encoding="utf-8")) if "gpu-" not in e["workload"]]
    section = (FOLDER.parent / readme).read_text(encoding="utf-8").split(heading)[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "|" in line]
    shown = {row[0]: row[1:] for row in rows[2:]}
    assert shown == {
        e["workload"]: [
            f"{e['ours']:.2f} {e['unit']}", f"{e['peer']:.2f}", f"{e['ratio']:.2f}", f"{e['memory_ratio']:.2f}",
            f"{e['limit_fraction']:.0%}",
        ]
        for e in entries
    }  # fmt: skip


def a_run(rate: float, peak: float, episodes: int = 4, steps: int = 2) -> dict:
    return {
        "workload": "ppo-fixed", "rate": rate, "unit": "episodes/s", "seconds": 4 / rate, "peak_gib": peak, "flops": 80,
        "work": {"episodes": episodes, "steps": steps}, "version": "trl 1.12.0",
        "phases": {"sample": 1 / rate, "other": 3 / rate},
    }  # fmt: skip


def test_ratio_is_of_neighbouring_runs():
    runs = {"ours": [a_run(8, 3), a_run(2, 4)], "peer": [a_run(2, 7), a_run(2, 8)]}
    entry = compare.result("ppo-fixed", runs, limit=400)
    assert entry.keys() >= FIELDS
    assert (entry["ours"], entry["peer"], entry["memory_ratio"]) == (5, 2, 0.5)
    # Pairs 8/2 and 2/2: not the ratio of the means. Their geometric mean is 2.
    assert (entry["ratio_low"], entry["ratio"], entry["ratio_high"]) == (1, pytest.approx(2), 4)
    # 80 operations in 4/8 and 4/2 seconds: 160 and 40 a second, 100 on average, of 400.
    assert entry["limit_fraction"] == pytest.approx(0.25)
    assert entry["phases"] == {"sample": 0.25, "other": 0.75}
    assert "sample 25%, other 75%" in compare.table([entry])


@pytest.mark.parametrize("work", [{"episodes": 3}, {"steps": 1}])
def test_sides_that_did_different_work_are_not_compared(work):
    with pytest.raises(UserError, match="different work"):
        compare.result("ppo-fixed", {"ours": [a_run(8, 3)], "peer": [a_run(2, 7, **work)]}, 1.0)


def test_sides_take_turns(monkeypatch):
    order = []

    def run(name, command):
        order.append("peer" if command[1].endswith("peer.py") else "ours")
        return a_run(1, 1)

    monkeypatch.setattr(compare, "run", run)
    monkeypatch.setattr(compare, "matrix_limit", lambda precision: 1.0)
    compare.compare("ppo-fixed", compare.Sides("model", "data", "python", "bf16"), repeats=3)
    assert order == ["ours", "peer", "peer", "ours", "ours", "peer"]


def test_merging_replaces_one_workload(tmp_path):
    path = tmp_path / "results.json"
    for name, rate in (("b", 1), ("a", 2), ("b", 3)):
        compare.merge({"workload": name, "ours": rate}, path)
    assert compare.read(path) == [{"workload": "a", "ours": 2}, {"workload": "b", "ours": 3}]
    path.write_text("[{", encoding="utf-8")
    with pytest.raises(UserError, match="results.json: is not JSON"):
        compare.merge({"workload": "a"}, path)


def test_killed_and_failed_runs_are_told_in_a_line():
    with pytest.raises(UserError, match="^sft: exit 1: ValueError: nine;"):
        compare.run("sft", [sys.executable, "-c", "raise ValueError('nine')"])
    with pytest.raises(UserError, match="^sft: killed, so probably out of memory"):
        compare.run("sft", [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])


# What is checked before anything runs


def test_patterns_choose_workloads():
    assert command_line.chosen("rm-qa,toy-ppo-*") == ["rm-qa", "toy-ppo-fixed", "toy-ppo-ragged"]
    with pytest.raises(UserError, match="'pp' names none of ppo-fixed"):
        command_line.chosen("sft,pp")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"repeats": 0}, "--repeats: 0"),
        ({"data": None}, "--data: missing"),
        ({"data": "nowhere"}, r"nowhere/hh-rlhf/.*gz: missing; DATA="),
        ({"model": "nowhere"}, "nowhere: no exported SmolLM2"),
        ({"peer": "no-such-python"}, "no-such-python: no such Python"),
        ({"peer": sys.executable}, "not TRL 1.12.0"),
    ],
)
def test_what_is_missing_is_named_with_its_remedy(tmp_path, change, message):
    for file in (workloads.FILES["hh"], "m/config.json", "m/model.safetensors", "m/tokenizer.json"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    given = {"repeats": 1, "data": str(tmp_path), "model": str(tmp_path / "m"), "peer": "python"} | change
    specs = {name: workloads.WORKLOADS[name] for name in ("rm-hh", "ppo-fixed")}
    with pytest.raises(UserError, match=message) as error:
        command_line.prepare(Namespace(**given), specs)
    assert "\n" not in str(error.value)


# Growth

PRINTS = "import json,time,sys\nfor n in {names}:\n print('noise'); print(json.dumps(dict(workload=n)), flush=True)\n"


def test_a_point_over_its_time_ends_its_axis():
    names = ["length-32", "length-64", "length-128"]
    line = [sys.executable, "-c", PRINTS.format(names=names[:2]) + "time.sleep(60)"]
    points = list(growth.measure(line, names, 5.0, end=float("inf")))
    assert [point["workload"] for point in points] == names[:2]


def test_a_point_that_fails_is_no_slow_point():
    line = [sys.executable, "-c", PRINTS.format(names=["k-2"]) + "raise ValueError('nine')"]
    with pytest.raises(UserError, match="exit 1: ValueError: nine"):
        list(growth.measure(line, ["k-2", "k-3"], 30.0, end=float("inf")))


def test_growth_entries_say_who_was_over_time():
    taken = {"ours": {"k-9": {"rate": 4.0, "peak_gib": 1.5}}, "peer": {}}
    point = growth.entry("k", 9, taken, 60)
    assert point["over_time"] == ["peer"] and point["peer"] is None and point["peer_gib"] is None
    assert (point["axis"], point["size"], point["unit"], point["ours"], point["ours_gib"]) == (
        "k",
        9,
        "pairs/s",
        4,
        1.5,
    )
    assert point.keys() >= {"date", "machine", "point_seconds"}


def a_point(axis: str, size: float, ours: float, peer: float | None) -> dict:
    return {
        "axis": axis, "size": size, "unit": "episodes/s", "ours": ours, "peer": peer, "ours_gib": 1.0,
        "peer_gib": peer and 2.0, "over_time": [] if peer else ["peer"], "point_seconds": 60, "date": "2026-01-02",
        "machine": "a machine",
    }  # fmt: skip


def colours(path: Path) -> set[str]:
    image = (plt.imread(path)[..., :3] * 255).round().astype(int).reshape(-1, 3)
    return {f"#{r:02x}{g:02x}{b:02x}" for r, g, b in set(map(tuple, image.tolist()))}


def test_plots_show_the_sides_that_were_measured(tmp_path):
    points = [a_point("length", 32, 8.0, 2.0), a_point("length", 64, 4.0, None), a_point("model", 0.73, 9.0, None)]
    file = tmp_path / "growth.json"
    file.write_text(json.dumps(points), encoding="utf-8")
    both, one = growth.plot_all(json.loads(file.read_text(encoding="utf-8")), tmp_path)
    assert (both.name, one.name) == ("growth-length.png", "growth-model.png")
    assert set(growth.COLOURS.values()) <= colours(both)
    assert growth.COLOURS["ours"] in colours(one) and growth.COLOURS["peer"] not in colours(one)


@pytest.mark.skipif(not (FOLDER / "growth.json").exists(), reason="not measured yet: make bench-growth")
def test_growth_file_has_each_point_once():
    points = json.loads((FOLDER / "growth.json").read_text(encoding="utf-8"))
    found = [f"{point['axis']}-{point['size']}" for point in points]
    assert found == list(workloads.POINTS)
    for point in points:
        assert point.keys() >= {"unit", "date", "machine", "point_seconds", "over_time"}
        for side in ("ours", "peer"):
            assert (point[side] is None) == (point[f"{side}_gib"] is None) == (side in point["over_time"])
