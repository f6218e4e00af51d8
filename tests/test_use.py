"""A trained model used by people who have not this project: stock generate() gives the evaluation's own texts."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import make_rows, read_jsonl, run_script, write_rows

from utils.launch.output_dir import CARD, CARD_MARK

pytestmark = pytest.mark.slow
SUFFIX = "\nTL;DR:"


@pytest.fixture(scope="module")
def trained(make_once, flan_t5) -> Path:
    """A folder with a full model, an adapter and a merged model, with a prompt of their own, and an evaluation."""

    def fill(folder: Path):
        train, test = (
            write_rows(folder / "train.jsonl", make_rows(40)),
            write_rows(folder / "test.jsonl", make_rows(5)),
        )
        common = (
            "--model_name_or_path", flan_t5, "--train_file", train, "--validation_file", test, "--max_train_steps", 6,
            "--learning_rate", 0.004, "--total_train_batch_size", 8, "--mixed_precision", "no", "--max_target_length",
            13, f"--source_suffix={SUFFIX}", "--output_dir",
        )  # fmt: skip
        models = [f"{name}={folder / name}" for name in ("full", "lora", "merged")]
        for words in (
            ("train_full.py", *common, folder / "full"),
            ("train_lora.py", *common, folder / "lora", "--merge_into", folder / "merged"),
            ("evaluate_rouge.py", "--models", *models, f"original={flan_t5}", "--test_file", test, "--max_new_tokens",
             13, "--output_dir", folder / "report", "--add_to_card", "true"),
        ):  # fmt: skip
            run = run_script(*words)
            assert run.returncode == 0, run.stderr
            (folder / "log").write_text(run.stderr)

    return make_once("trained_with_a_prompt", fill)


def read_python(card: str, name: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    return code.replace(f"name = {name!r}", f"name = sys.argv[1] + '/{name}'")


def test_the_cards_lines_give_the_evaluations_texts(trained, tmp_path):
    """In a process that imports nothing of ours. A full model needs no more than its folder."""
    dialogues = {row["id"]: row["dialogue"] for row in make_rows(5)}
    program = ["import json, sys", f"texts, dialogues = {{}}, {dialogues!r}"]
    for name in ("full", "lora", "merged"):
        code = read_python((trained / name / CARD).read_text(), name).replace("print(", "texts[kind][row_id] = (")
        if name != "lora":
            code = code.replace(", generation_config=settings", "")
        load, _, use = code.partition("dialogue = ")
        use = use.partition("\n")[2].replace("\n", "\n    ")
        program += [f"kind = {name!r}; texts[kind] = {{}}", load]
        program += ["for row_id, dialogue in dialogues.items():", f"    {use}"]
    program += ["assert not any(name.split('.')[0] == 'utils' for name in sys.modules)", "print(json.dumps(texts))"]
    words = [sys.executable, "-c", "\n".join(program), trained]
    run = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    expected = {}
    for line in read_jsonl(trained / "report" / "predictions.jsonl"):
        expected.setdefault(line["model"], {})[line["id"]] = line["prediction"]
    texts = json.loads(run.stdout.splitlines()[-1])
    assert texts == {name: expected[name] for name in texts} and set(texts) == {"full", "lora", "merged"}
    assert len({str(expected[name]) for name in ("full", "lora", "original")}) == 3, "they tell the models apart"


def test_the_evaluation_takes_the_models_prompt_and_says_so(trained):
    log = (trained / "log").read_text()
    for name in ("full", "lora", "merged"):
        text = r"the prompt is the model's own, 'Summarize the following conversation.\n' and '\nTL;DR:' around the"
        assert f"{name}: {text}" in log
        assert json.loads((trained / name / "generation_config.json").read_text())["source_suffix"] == SUFFIX
    assert "original: the prompt" not in log


def test_the_card(trained):
    for name, library in (("full", "transformers"), ("lora", "peft"), ("merged", "transformers")):
        card = (trained / name / CARD).read_text()
        metadata = yaml.safe_load(card.split("---\n")[1])
        assert metadata == {"library_name": library, "pipeline_tag": "summarization"}
        assert f"# {name}\n" in card and "on 40 examples of `train.jsonl`" in card
        assert "| learning_rate | 0.004 |" in card and ("| lora_r | 32 |" in card) == (name != "full")
        metrics = read_jsonl(trained / ("full" if name == "full" else "lora") / "metrics.jsonl")
        assert f"| validation loss per target token, in nats | {metrics[-1]['loss']:.4f} (update 6) |" in card
        assert r"on the test split of test.jsonl: num\_beams 1" in card
        scores = json.loads((trained / "report" / "results.json").read_text())["models"][name]["scores"]
        assert f"| {name} | average | {100 * scores['average']['rouge1']['value']:.2f} " in card


def test_scores_of_other_systems_do_not_reach_a_card(trained, tmp_path):
    texts = write_rows(tmp_path / "texts.jsonl", [{"id": row["id"], "prediction": "Hi."} for row in make_rows(5)])
    words = ("evaluate_rouge.py", "--test_file", trained / "test.jsonl", "--output_dir", tmp_path / "out")
    run = run_script(*words, "--predictions_file", texts)
    assert run.returncode == 0, run.stderr
    refused = run_script(*words, "--report_only", "--add_to_card")
    assert refused.returncode == 2
    assert f"--add_to_card: {tmp_path / 'out'} holds scores of --predictions_file, not of models" in refused.stderr


def test_a_card_of_ones_own_stays(trained, flan_t5, tmp_path):
    """Also under --overwrite_output_dir; ours is written anew."""
    words = (
        "train_full.py", "--model_name_or_path", flan_t5, "--train_file", trained / "train.jsonl",
        "--max_train_steps", 1, "--mixed_precision", "no", "--output_dir", tmp_path, "--overwrite_output_dir", "true",
    )  # fmt: skip
    for content, stays in (("# Mine\n", True), (f"{CARD_MARK}\n# Old\n", False)):
        (tmp_path / CARD).write_text(content)
        run = run_script(*words)
        assert run.returncode == 0, run.stderr
        assert ((tmp_path / CARD).read_text() == content) == stays
