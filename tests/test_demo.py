"""The demo as README says it: the three commands, and results that are worth showing."""

import json
import os
import random
import subprocess
from pathlib import Path

import pytest
from conftest import REPOSITORY, read_jsonl, run_script, warm_launch

from demo.facts import extract_facts, guess_summaries, score_facts
from demo.make_demo import make_splits
from utils.generation.partial_texts import Summary

EXAMPLE = 29  # of the validation split, as README shows it
KINDS = ("who", "item", "time", "place")


@pytest.fixture(scope="module")
def demo(make_once):
    """The folder in which the three commands were run."""

    def fill(folder: Path):
        for script, seconds in (("train_lora", 240), ("train_full", 360), ("evaluate_rouge", 120)):
            command, environment = warm_launch(REPOSITORY / f"{script}.py")
            environment = os.environ | environment
            command.append("--demo")
            run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds)
            assert run.returncode == 0, run.stderr
        (folder / "printed.txt").write_text(run.stdout)

    return make_once("demo", fill)


@pytest.fixture(scope="module")
def results(demo):
    return json.loads((demo / "demo-rouge-report" / "results.json").read_text())


@pytest.mark.slow
def test_rouge_is_far_above_a_random_summary(results):
    rouge1 = {name: model["scores"]["average"]["rouge1"]["value"] for name, model in results["models"].items()}
    assert set(rouge1) == {"original", "full", "lora", "random"}
    assert results["num_dialogues"] == 40 and results["num_rows"] == 120
    for name in ("full", "lora"):
        assert rouge1[name] > rouge1["random"] + 0.15
        assert rouge1[name] > rouge1["original"]


@pytest.mark.parametrize(("name", "share"), [("full", 2 / 3), ("lora", 1 / 2)])
def test_facts_are_right(results, name, share):
    for kind in KINDS:
        fact = results["facts"][name][kind]
        assert fact["correct"] >= share * fact["total"], kind
        assert fact["correct"] > fact["majority"] * fact["total"], kind


@pytest.mark.slow
def test_summaries_are_the_evaluations(demo):
    command, environment = warm_launch(REPOSITORY / "summarize.py")
    command.append("--demo")
    run = subprocess.run(command, cwd=demo, env=os.environ | environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    rows = read_jsonl(demo / "demo-summaries.jsonl")
    assert [row["id"] for row in rows] == [row["id"] for row in read_jsonl(REPOSITORY / "demo" / "test.jsonl")]
    lines = read_jsonl(demo / "demo-rouge-report" / "predictions.jsonl")
    expected = {line["dialogue"]: line["prediction"] for line in lines if line["model"] == "lora"}
    assert [row["generated"] for row in rows] == [expected[row["dialogue"]] for row in rows]


@pytest.mark.slow
def test_sample_is_wrong_before_and_right_after(demo, tmp_path):
    """The dialogue that README shows, from the validation split."""
    index = EXAMPLE
    row = read_jsonl(REPOSITORY / "demo" / "validation.jsonl")[index]
    command, environment = warm_launch(REPOSITORY / "evaluate_rouge.py")
    command += ["--demo", "--split", "validation", "--example_index", str(index), "--max_eval_samples", "10"]
    command += ["--output_dir", str(tmp_path)]
    run = subprocess.run(command, cwd=demo, env=os.environ | environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    shown = dict(part.split("\n", 1) for part in run.stdout.split("\n\nROUGE")[0].split("--- ")[1:])
    assert shown["dialogue"].strip() == row["dialogue"] and shown["human summary"].strip() == row["summary"]
    assert extract_facts(shown["original"].strip()) != row["facts"]
    for name in ("full", "lora"):
        assert extract_facts(shown[name].strip()) == row["facts"]


@pytest.mark.slow
def test_all_weights_are_trained_on_two_processes(tmp_path):
    words = ("train_full.py", "--demo", "--max_train_steps", 2, "--output_dir", tmp_path / "out")
    run = run_script(*words, num_processes=2)
    assert run.returncode == 0, run.stderr


def test_the_data_is_what_make_demo_makes():
    for split, rows in make_splits().items():
        assert read_jsonl(REPOSITORY / "demo" / f"{split}.jsonl") == rows


def test_data():
    train, validation, test = (
        read_jsonl(REPOSITORY / "demo" / f"{split}.jsonl") for split in ("train", "validation", "test")
    )
    assert len(train) >= 2000 and len(validation) >= 128 and len(test) == 120
    assert len({row["dialogue"] for row in test}) == 40
    assert all(test[index]["dialogue"] == test[index - index % 3]["dialogue"] for index in range(120))
    splits = [{row["dialogue"] for row in rows} for rows in (train, validation, test)]
    assert not (splits[0] & splits[1] or splits[0] & splits[2] or splits[1] & splits[2])
    assert all(extract_facts(row["summary"]) == row["facts"] for row in train + validation + test)


def test_facts_count_only_in_their_role():
    row = next(row for row in read_jsonl(REPOSITORY / "demo" / "test.jsonl") if set(row["facts"]) == set(KINDS))
    swapped = row["summary"].replace("#Person1#", "#X#").replace("#Person2#", "#Person1#").replace("#X#", "#Person2#")
    words = row["summary"].rstrip(".").split()
    random.Random(0).shuffle(words)
    shuffled = " ".join(words)
    summaries = {
        text: {row["dialogue"]: Summary(text, None)}
        for text in (row["summary"], swapped, row["dialogue"], "", shuffled)
    }
    scores = score_facts(summaries, [row], [row["facts"]])
    assert [scores[row["summary"]][kind]["correct"] for kind in KINDS] == [1, 1, 1, 1]
    assert scores[swapped]["who"]["correct"] == 0 and scores[swapped]["item"]["correct"] == 1
    for text in (row["dialogue"], "", shuffled):
        assert [scores[text][kind]["correct"] for kind in KINDS] == [0, 0, 0, 0]


def test_random_summaries_are_training_summaries():
    rows = read_jsonl(REPOSITORY / "demo" / "train.jsonl")
    summaries = guess_summaries(rows, [{"dialogue": text} for text in ("a", "b")], seed=3)
    assert summaries.keys() == {"a", "b"}
    assert {summary.text for summary in summaries.values()} <= {row["summary"] for row in rows}
