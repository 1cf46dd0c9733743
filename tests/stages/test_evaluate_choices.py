"""`align evaluate choices` through its true entry point, with the config of preset smollm2."""

import json

import pytest

from stages.__main__ import main
from tests.folders import lines

pytestmark = pytest.mark.xdist_group("stages")

ROWS = [
    {"prompt": "what is the opposite of hot ?", "choices": ["cold", "the old cow"], "answer": 0, "source": "qa"},
    {"prompt": "name a colour", "choices": ["red", "dog", "cat"], "answer": "A", "source": "qa"},
    {"choices": ["he is kind", "she is kind"], "source": "pairs"},
    {"choices": ["he is late", "she is late"], "source": "pairs"},
    {"prompt": "hello " * 300, "choices": ["a", "b"], "answer": 1, "source": "too long"},
]


def words(mini, tmp_path, *more: str, rows=ROWS) -> list[str]:
    file = lines(tmp_path / "choices.jsonl", *rows)
    config = ["--config", "configs/smollm2/evaluate_choices.yaml", "--run", str(mini.run)]
    return ["evaluate", "choices", *config, "--choices_file", str(file), "--output_dir", str(tmp_path / "out"),
            "--bf16", "false", *more]  # fmt: skip


def test_every_policy_weighs_every_row(mini, tmp_path, capsys):
    assert main(words(mini, tmp_path)) == 0
    out = capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "choices.json").read_text())
    report = written["groups"]
    assert written["data"]["dropped"] == {"too_long": 1} and list(written["models"]) == ["base", "sft", "ppo_ptx"]
    assert list(report) == ["qa", "pairs (pairs)"]
    assert list(report["qa"]["policies"]) == list(report["pairs (pairs)"]["policies"]) == ["base", "sft", "ppo_ptx"]
    assert report["qa"]["policies"]["sft"]["gain_vs_sft"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert 0 <= report["pairs (pairs)"]["policies"]["base"]["entropy"]["mean"] <= 1
    assert "1 of 5 rows over 256 tokens left out" in out and "qa: ppo_ptx: accuracy" in out
    weighed = [json.loads(line) for line in (tmp_path / "out" / "weighed.jsonl").read_text().splitlines()]
    assert [len(row["base"]["logprobs"]) for row in weighed] == [2, 3, 2, 2] and "kind" not in str(weighed)
    assert (tmp_path / "out" / "choices.md").read_text().count("| ppo_ptx |") == 2


def test_a_report_is_not_overwritten_unasked(mini, tmp_path, capsys):
    assert main(words(mini, tmp_path, "--num_rows", "2")) == 0
    assert main(words(mini, tmp_path)) == 2
    assert "holds a report" in capsys.readouterr().err
    assert main(words(mini, tmp_path, "--overwrite_output_dir", "true")) == 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "choices": ["a", "b", "c"]}, "has no 'answer'"),
        ({"prompt": "p", "choices": ["a", "b"]}, "has no 'answer'"),
        ({"choices": ["a", "b", "c"]}, "has no 'answer'"),
        ({"prompt": "p", "choices": ["a", "b"], "answer": 2}, "'answer' is none of the choices"),
        ({"prompt": "p", "choices": ["a", "b"], "answer": "C"}, "'answer' is none of the choices"),
        ({"prompt": "p", "choices": ["a", "b"], "answer": True}, "'answer' is none of the choices"),
        ({"prompt": "p", "choices": ["a", "a"], "answer": 0}, "alike"),
        ({"prompt": "p", "choices": ["a"], "answer": 0}, "has 1 choices"),
        ({"prompt": "p", "choices": ["a", " "], "answer": 0}, "no list of texts"),
        ({"prompt": "", "choices": ["a", "b"], "answer": 0}, "'prompt' is empty"),
    ],
)
def test_rows_that_cannot_be_meant_stop_it_by_name(mini, tmp_path, capsys, row, message):
    assert main(words(mini, tmp_path, rows=[ROWS[0], row])) == 2
    error = capsys.readouterr().err
    assert f"choices.jsonl:2: {message}" in error or ("choices.jsonl:2: " in error and message in error)
