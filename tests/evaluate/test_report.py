"""Tables, plots and the page: what they say, that they are written, and that a response cannot break out of them."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from align.evaluate import plots, report
from align.evaluate.best_of_n import best_of_report
from align.evaluate.schema import POLICIES
from align.evaluate.summary import by_reward_model, summarise

SCRIPT = '<script>alert("x")</script> | a\nb & <img src=x onerror=y>'


def assert_picture(path):
    """A PNG of a size worth looking at, on which something besides white is drawn."""
    assert path.read_bytes().startswith(b"\x89PNG")
    pixels = np.asarray(Image.open(path).convert("L"))
    assert min(pixels.shape) >= 400 and (pixels < 200).mean() > 0.005


def test_every_plot_is_written(tmp_path, make_evaluation, training_rows, overoptimisation_rows, sft_log):
    evaluation = make_evaluation(n=60, without=("ppo",))
    summary = summarise(evaluation)
    plots = report.write_plots(
        tmp_path, evaluation, summary, {"ppo_ptx": training_rows, "ppo": []}, sft_log, overoptimisation_rows
    )
    names = {path.name for path in plots.values()}
    assert names == {
        "policies.png",
        "use_cases_ppo_ptx.png",
        "training_ppo_ptx.png",
        "calibration.png",
        "sft.png",
        "overoptimisation.png",
    }
    for path in plots.values():
        assert_picture(path)


EMPTY = {
    "policies": lambda path: plots.plot_policies({"policies": dict.fromkeys(POLICIES)}, path),
    "use_cases": lambda path: plots.plot_use_cases({"policies": {}}, path),
    "training": lambda path: plots.plot_training([], path),
    "overoptimisation": lambda path: plots.plot_overoptimisation([{"episode": 1}], path),
    "calibration": lambda path: plots.plot_calibration({}, path),
    "sft": lambda path: plots.plot_sft([], path),
}


@pytest.mark.parametrize("name", EMPTY)
def test_plots_of_nothing_say_so(tmp_path, name):
    assert EMPTY[name](tmp_path / "new" / f"{name}.png").stat().st_size > 5000


def test_a_metric_that_was_not_logged_leaves_its_panel(tmp_path, training_rows):
    rows = [{k: v for k, v in row.items() if k in ("episode", "objective/kl")} for row in training_rows]
    rows[3]["objective/kl"] = float("nan")
    assert_picture(plots.plot_training(rows, tmp_path / "training.png"))


def test_a_use_case_with_one_prompt_is_drawn_and_tabled(tmp_path, make_evaluation):
    evaluation = make_evaluation(n=11)
    assert_picture(plots.plot_use_cases(evaluation, tmp_path / "use_cases.png"))
    assert "(n=1)" in report.write_tables(evaluation)


def test_error_bars_reach_down_to_low_and_up_to_high():
    assert plots._bars([{"mean": 5.0, "low": 4.0, "high": 8.0}]).tolist() == [[1.0], [3.0]]


def test_the_same_numbers_give_the_same_picture(tmp_path, make_evaluation):
    summary = summarise(make_evaluation(n=30))
    one, two = (plots.plot_policies(summary, tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    assert one == two


def test_tables_hold_the_summary(make_evaluation):
    evaluation = make_evaluation(without=("ppo",))
    summary = summarise(evaluation)
    text = report.write_tables(evaluation, summary)
    gold = summary["policies"]["ppo_ptx"]["sampled"]["gold"]
    assert f"| PPO-ptx | {gold['mean']:.2f} [{gold['low']:.2f}, {gold['high']:.2f}] |" in text
    assert "| PPO |" not in text
    for title in ("Policies", "Gold score by use case", "Gold score by language", "yes/no fields", "Reward model"):
        assert title in text
    assert "| satisfies constraint |" in text and "| open_qa | 20 |" in text and "| zh |" in text
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):  # every row of a table has as many cells
        assert len({line.count("|") for line in block.splitlines()}) == 1


def around(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.25, "high": mean + 0.5}


def test_each_number_of_a_policy_stands_in_its_column(make_evaluation):
    """All numbers differ; each interval is 0.25 below its mean and 0.5 above it."""
    evaluation = make_evaluation(n=4, without=("base", "prompted", "ppo", "ppo_ptx"))
    summary = summarise(evaluation)
    keys = ("gold", "gain_vs_sft", "win_rate_vs_sft")
    summary["policies"]["sft"] = {
        "sampled": {key: around(1.0 + i) for i, key in enumerate(keys)},
        "greedy": {key: around(4.0 + i) for i, key in enumerate(keys)},
        "proxy": 7.0, "kl": 8.0, "perplexity": 9.0, "response_tokens": 10.0, "finished": 0.11,
    }  # fmt: skip
    table = next(t for t in report.tables(evaluation, summary) if t.title == "Policies")
    head, _, row = table.markdown().splitlines()[4:]
    assert head == (
        "| policy | sampled: gold | sampled: gain | sampled: win rate | greedy: gold | greedy: gain | greedy: win rate "
        "| proxy | KL | perplexity | tokens | finished |"
    )
    assert row == (
        "| SFT | 1.00 [0.75, 1.50] | 2.00 [1.75, 2.50] | 3.00 [2.75, 3.50] "
        "| 4.00 [3.75, 4.50] | 5.00 [4.75, 5.50] | 6.00 [5.75, 6.50] | 7.00 | 8.00 | 9.00 | 10.0 | 11.0% |"
    )


def test_each_number_of_the_reward_model_stands_in_its_row(make_evaluation):
    evaluation = make_evaluation(n=4)
    summary = summarise(evaluation)
    summary["rm"] = {"accuracy": around(0.3), "gold_accuracy": around(0.4), "demonstration_mean": 0.06, "pairs": 7}
    summary["labelers"] = {"agreement": around(0.5)}
    table = next(t for t in report.tables(evaluation, summary) if t.title == "Reward model").markdown()
    assert "Over 7 held-out pairs" in table and table.splitlines()[4:] == [
        "| measure | value |",
        "|---|---:|",
        "| accuracy against labelers | 0.30 [0.05, 0.80] |",
        "| accuracy against gold | 0.40 [0.15, 0.90] |",
        "| agreement of two labelers | 0.50 [0.25, 1.00] |",
        "| mean score of demonstrations | 0.06 |",
    ]


def test_scores_by_use_case_are_of_the_sampled_answers(make_evaluation):
    evaluation = make_evaluation(n=2, without=("base", "prompted", "ppo", "ppo_ptx"))
    for mode, scores in (("sampled", (2.0, 6.0)), ("greedy", (3.0, 7.0))):
        for record, score in zip(evaluation["policies"]["sft"][mode], scores, strict=True):
            record["likert"] = score
    table = next(t for t in report.tables(evaluation) if t.title == "Gold score by use case")
    assert table.header == ["use case", "prompts", "SFT"]
    assert table.rows == [["generation", "1", "2.00 (n=1)"], ["open_qa", "1", "6.00 (n=1)"]]


def test_fields_table_by_hand(make_evaluation):
    evaluation = make_evaluation(n=4, without=("base", "prompted", "ppo", "ppo_ptx"))
    for i, record in enumerate(evaluation["policies"]["sft"]["sampled"]):
        record["fields"] = {"satisfies_constraint": [True, False, None, True][i]}  # None: no constraint was stated
    table = next(t for t in report.tables(evaluation) if "fields" in t.title)
    assert table.rows == [["satisfies constraint", "0.67 [0.21, 0.94]"]]  # Wilson, 2 of 3


def test_verdicts_follow_the_interval_of_the_gain(make_evaluation):
    summary = summarise(make_evaluation())
    ppo = summary["policies"]["ppo"]
    ppo["sampled"]["gain_vs_sft"] = {"mean": 0.1, "low": -0.1, "high": 0.3}
    ppo["greedy"]["gain_vs_sft"] = {"mean": -0.3, "low": -0.4, "high": -0.2}
    lines = report.verdicts(summary)
    assert "PPO, sampled, does not differ measurably" in lines[0] and "PPO, greedy, is worse" in lines[1]
    assert all("is better than SFT" in line for line in lines[2:])


def test_transcripts_are_spread_over_use_cases_and_paired(make_evaluation):
    rows = report.pick_transcripts(make_evaluation(), n=20)
    assert rows == report.pick_transcripts(make_evaluation(), n=20)
    cases = [row["use_case"] for row in rows]
    assert len(rows) == 20 and all(cases.count(case) == 2 for case in cases)
    for row in rows:
        assert {answer["id"] for answer in row["responses"].values()} == {row["id"]}


@pytest.mark.parametrize(("asked", "mode"), [({}, "sampled"), ({"mode": "greedy"}, "greedy")])
def test_transcripts_are_of_the_mode_asked_for(make_evaluation, asked, mode):
    evaluation = make_evaluation(n=3, without=("base", "prompted", "ppo"))
    for name in ("sft", "ppo_ptx"):
        for drawn in ("sampled", "greedy"):
            for record in evaluation["policies"][name][drawn]:
                record["response"] = f"{name}, {drawn}, {record['id']}"
    rows = report.pick_transcripts(evaluation, n=3, **asked)
    assert [{name: answer["response"] for name, answer in row["responses"].items()} for row in rows] == [
        {"sft": f"sft, {mode}, p{i}", "ppo_ptx": f"ppo_ptx, {mode}, p{i}"} for i in range(3)
    ]


class Tags(HTMLParser):
    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


@pytest.fixture
def page(tmp_path, make_evaluation):
    evaluation = make_evaluation(n=40, without=("ppo",))
    for record in evaluation["policies"]["sft"]["sampled"]:
        record["prompt"] = record["response"] = record["use_case"] = SCRIPT
    plot = plots.plot_policies(summarise(evaluation), tmp_path / "report" / "plots" / "policies.png")
    return report.write_report(tmp_path / "report", evaluation, {"Gold score": plot})


def test_the_page_escapes_responses(page):
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text and "&lt;script&gt;" in text
    assert {tag for tag, _ in Tags(text).found}.isdisjoint({"script", "link", "iframe"})
    markdown = (page.parent / "report.md").read_text(encoding="utf-8")
    assert "<script" not in markdown and '&lt;script&gt;alert("x")&lt;/script&gt; \\| a<br>b' in markdown


def test_the_page_needs_no_network_and_finds_its_images(page):
    tags = Tags(page.read_text(encoding="utf-8")).found
    images = [attributes["src"] for tag, attributes in tags if tag == "img"]
    assert images == ["plots/policies.png"] and (page.parent / images[0]).is_file()
    assert "http" not in page.read_text(encoding="utf-8")
    assert sum(attributes.get("class") == "transcript" for _, attributes in tags) == 20


def test_the_page_takes_the_transcripts_it_is_given(tmp_path, make_evaluation):
    evaluation = make_evaluation(n=20)
    evaluation["transcripts"] = report.pick_transcripts(evaluation, 3)
    index = report.write_report(tmp_path, evaluation, {})
    assert index.name == "index.html" and index.read_text(encoding="utf-8").count('class="transcript"') == 3


def test_transcripts_table_by_hand():
    rows = [{"prompt": "Say hi.", "responses": {"sft": {"likert": 3.0, "response": "hi"}}}] * 3
    table = report.transcripts_table(rows, ["sft", "ppo"], 2)
    assert "| prompt | SFT | PPO |" in table and table.count("| Say hi. | (3) hi | - |") == 2


def test_transcripts_shown_are_of_all_sources_of_a_longer_list():
    """They lie in the file's order, so the first ones would be of its first sources."""
    rows = [{"source": name, "n": n} for name in "abcdefgh" for n in range(5)]
    assert {row["source"] for row in report.shown(rows)} == set("abcdefgh") and len(report.shown(rows)) == 20
    assert report.shown(rows[:3]) == rows[:3] and report.shown([]) == []


def test_prompts_that_all_gain_alike_prove_nothing(make_evaluation):
    summary = summarise(make_evaluation())
    summary["policies"]["ppo"]["sampled"]["gain_vs_sft"] = {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert "does not differ measurably from SFT" in report.verdicts(summary)[0]


def test_the_over_optimisation_plot_has_the_law_of_rl(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path, empty=None: figures.append(figure))
    d = np.array([0.5, 0.0, 1.0, 2.0, 3.0])
    gains = [0.5 * (1.2 - 0.4 * np.log(0.5)), 0.0, *(at * (1.2 - 0.4 * np.log(at)) for at in d[2:])]
    rows = [{"kl": at**2, "proxy": at, "gold": 4 + gain} for at, gain in zip(d, gains, strict=True)]
    plots.plot_overoptimisation(rows, tmp_path)
    (law,) = figures[0].axes[1].get_legend().get_texts()
    assert "1.20" in law.get_text() and "0.40" in law.get_text()
    plots.plot_overoptimisation(rows[2:], tmp_path)  # without SFT's score there is no gain
    assert figures[1].axes[1].get_legend() is None


# Best-of-n


def with_best_of_n(evaluation: dict, gold: bool = True) -> dict:
    """4 answers a prompt: proxies 0, 1, 2, 3; the judge likes the third best."""
    prompts = len(evaluation["policies"]["sft"]["sampled"])
    scores = {"proxy": [0.0, 1.0, 2.0, 3.0]} | ({"gold": [1.0, 6.0, 1.0, 1.0]} if gold else {})
    for name, proxy, kl in (("ppo", 9.0, 5.0), ("ppo_ptx", 2.0, 0.2)):
        for record in evaluation["policies"][name]["sampled"]:
            record |= {"proxy": proxy, "kl": kl, "likert": 2.0 if gold else None}
    return evaluation | {"best_of_n": best_of_report([scores] * prompts, evaluation["policies"])}


def test_best_of_n_is_told_beside_ppo(tmp_path, make_evaluation):
    """Best of 2 draws the answers of proxy 1, 2 and 3 in 1, 2 and 3 of the 6 pairs: proxy 14/6, gold 11/6."""
    evaluation = with_best_of_n(make_evaluation(n=20))
    lines = report.best_of_verdicts(evaluation["best_of_n"])
    assert len(lines) == 4
    assert "PPO at 5.00 nats scores 9.00 by the reward model, SFT's best of 4 (at most 0.64 nats) 3.00" in lines[0]
    beyond = "no n up to 4 scores as much; it is further from SFT than best of 4 can be."
    assert f"gain 6.00 [6.00, 6.00]; {beyond}" in lines[0]
    assert "PPO-ptx at 0.20 nats scores 2.00 by the reward model, SFT's best of 2 (at most 0.19 nats) 2.33" in lines[2]
    assert lines[2].endswith("gain -0.33 [-0.33, -0.33]; best of 2 scores as much.")
    assert "2.00 by the judge" in lines[3] and "1.83: paired gain 0.17" in lines[3]
    plots_by_caption = report.write_plots(tmp_path / "plots", evaluation, summarise(evaluation))
    assert_picture(plots_by_caption["SFT's best of n beside PPO"])
    text = report.write_report(tmp_path, evaluation, plots_by_caption).with_name("report.md").read_text("utf-8")
    assert all(line in text for line in lines)
    table = next(t for t in report.tables(evaluation) if "best of n" in t.title)
    assert table.header == ["policy", "KL", "proxy", "gold"]
    assert table.rows[1] == ["SFT, best of 2", "0.19", "2.33 [2.33, 2.33]", "1.83 [1.83, 1.83]"]
    assert [row[0] for row in table.rows] == ["SFT, best of 1", "SFT, best of 2", "SFT, best of 4", "PPO", "PPO-ptx"]
    law = evaluation["best_of_n"]["laws"]["gold"]
    assert f"gold alpha {law['alpha']:.2f}, beta {law['beta']:.2f}, peaks at {law['peak_kl']:.2f} nats" in table.note


def test_best_of_n_without_a_judge_has_no_gold(tmp_path, make_evaluation):
    evaluation = make_evaluation(n=20)
    for policy in evaluation["policies"].values():
        for record in (*policy["sampled"], *policy["greedy"]):
            record |= {"likert": None, "fields": {}, "repetition": 0.0}
    evaluation["by_reward_model"] = by_reward_model(evaluation["policies"], 0)
    evaluation = with_best_of_n(evaluation, gold=False)
    assert [line.count("judge") for line in report.best_of_verdicts(evaluation["best_of_n"])] == [0, 0]
    table = next(t for t in report.tables(evaluation) if "best of n" in t.title)
    assert table.header == ["policy", "KL", "proxy"] and "gold" not in table.note
    assert_picture(plots.plot_best_of_n(evaluation["best_of_n"], tmp_path / "best_of_n.png"))
