"""What becomes of rows: tokens cut where they may be, dialogues grouped, real DialogSum read as it is."""

import numpy as np
import pytest
from accelerate import Accelerator
from conftest import DIALOGSUM, make_rows, write_rows
from helpers import write_bart
from transformers import AutoTokenizer

from utils.config import EvaluationConfig, TrainingConfig, UserError
from utils.data.batching import measure_lengths
from utils.data.rows import group_by_dialogue, load_rows
from utils.data.tokens import tokenize_prompts, tokenize_rows
from utils.modeling.loading import load_tokenizer
from utils.prompting import build_prompt

TOKENIZER = DIALOGSUM.parent / "t5-tokenizer"
needs_dialogsum = pytest.mark.skipif(not DIALOGSUM.is_dir(), reason="DialogSum is not beside the project")


def test_prompt():
    expected = "Summarize the following conversation.\n#Person1#: Hi.\n#Person2#: Bye.\nSummary:"
    assert build_prompt("#Person1#: Hi.\n#Person2#: Bye.") == expected


def test_truncation_cuts_the_dialogue_and_keeps_the_question(flan_t5):
    tokenizer = load_tokenizer(str(flan_t5))
    dialogue = make_rows(1)[0]["dialogue"]
    (whole,), (length,) = tokenize_prompts([dialogue], tokenizer, 1024)
    assert whole == tokenizer(build_prompt(dialogue)).input_ids and length == len(whole) > 20
    (cut,), (uncut_length,) = tokenize_prompts([dialogue], tokenizer, 20)
    suffix = tokenizer("Summary:").input_ids  # with the end token
    assert (len(cut), uncut_length) == (20, length)
    assert cut == whole[: 20 - len(suffix)] + suffix and whole[-len(suffix) :] == suffix


def test_truncation_of_a_prompt_that_starts_with_a_token(tmp_path):
    write_bart(tmp_path / "bart")
    tokenizer = load_tokenizer(str(tmp_path / "bart"))
    (cut,), _ = tokenize_prompts([make_rows(1)[0]["dialogue"]], tokenizer, 40)
    assert len(cut) == 40 and cut[0] == tokenizer.bos_token_id and cut.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(cut).endswith("\nSummary:</s>")


@pytest.mark.parametrize("damage", ["truncated", "changed", "without its hash"])
def test_damaged_tokens_are_made_anew(flan_t5, tmp_path, monkeypatch, damage):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    config, tokenizer = TrainingConfig(), load_tokenizer(str(flan_t5))
    expected = tokenize_rows(Accelerator(), make_rows(30), tokenizer, config, "train").to_list()
    (file,) = (tmp_path / "dialogue_tokens").glob("*/tokens.arrow")
    (file.parent / "tmpabc").touch()  # as datasets leaves it when it is killed
    content = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "changed":  # an id of the first prompt
        first = np.array(expected[0]["input_ids"][:8], dtype=np.int32).tobytes()
        assert content.count(first) == 1
        file.write_bytes(content.replace(first, first[:-4] + b"\x05\0\0\0"))
    else:
        file.with_suffix(".json").unlink()
    assert tokenize_rows(Accelerator(), make_rows(30), tokenizer, config, "train").to_list() == expected
    assert file.read_bytes() == content
    assert {path.name for path in file.parent.iterdir()} == {"tokens.arrow", "tokens.json"}


def test_a_full_cache_is_named(flan_t5, small_disk, monkeypatch):
    folder = small_disk(64)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
    config, tokenizer = TrainingConfig(), load_tokenizer(str(flan_t5))
    with pytest.raises(UserError, match=f"^the cache {folder}/dialogue_tokens: No space left on device; HF_HOME or"):
        tokenize_rows(Accelerator(), make_rows(1000), tokenizer, config, "train")


def test_targets_are_cut_before_the_end_token(flan_t5, data_files, caplog):
    caplog.set_level("INFO", logger="utils")
    tokenizer = load_tokenizer(str(flan_t5))
    config = TrainingConfig(train_file=str(data_files["train"]), max_target_length=10, max_source_length=40)
    data = tokenize_rows(Accelerator(), load_rows(config, "train"), tokenizer, config, "train")
    full = [tokenizer(row["summary"]).input_ids for row in make_rows(40)]
    assert data["labels"] == [ids if len(ids) <= 10 else [*ids[:9], tokenizer.eos_token_id] for ids in full]
    assert data["id"] == [f"row_{index}" for index in range(40)]
    num_sources = sum(len(tokenizer(build_prompt(row["dialogue"])).input_ids) > 40 for row in make_rows(40))
    num_targets = sum(len(ids) > 10 for ids in full)
    assert 0 < num_targets < 40 and 0 < num_sources < 40
    assert f"truncated: {num_sources} sources at 40, {num_targets} targets at 10" in caplog.text


def test_rows_of_a_dialogue_are_its_references():
    rows = [{"id": str(number), "dialogue": text, "summary": f"s{number}"} for number, text in enumerate("abaab")]
    assert group_by_dialogue(rows) == [
        {"id": "0", "dialogue": "a", "ids": ["0", "2", "3"], "references": ["s0", "s2", "s3"]},
        {"id": "1", "dialogue": "b", "ids": ["1", "4"], "references": ["s1", "s4"]},
    ]


@needs_dialogsum
def test_dialogsum_with_the_real_tokenizer():
    config = TrainingConfig(
        train_file=str(DIALOGSUM / "validation.csv"), validation_file=str(DIALOGSUM / "validation.csv")
    )
    rows = load_rows(config, "train")
    data = tokenize_rows(Accelerator(), rows, AutoTokenizer.from_pretrained(TOKENIZER), config, "train")
    lengths = measure_lengths(data)
    # The train split has mean 234 and median 212 source tokens and 36 target tokens; validation is alike.
    assert len(rows) == 500
    assert np.median(lengths[:, 0]) == pytest.approx(212, rel=0.1) and lengths[:, 0].mean() == pytest.approx(
        234, rel=0.1
    )
    assert lengths[:, 1].mean() == pytest.approx(36, rel=0.15)


@needs_dialogsum
def test_dialogsum_test_split_has_three_references():
    dialogues = group_by_dialogue(load_rows(EvaluationConfig(test_file=str(DIALOGSUM / "test.csv")), "test"))
    assert len(dialogues) == 300 and {len(dialogue["references"]) for dialogue in dialogues} == {3}
    assert dialogues[14]["ids"][0].endswith("_1") and "how to adjust my life" in dialogues[14]["dialogue"]


@pytest.mark.parametrize("kind", ["columns", "lists"])
def test_several_references(tmp_path, kind):
    """An evaluation takes all, a training the first, or all if it is told to."""
    given = [{"id": "a", "dialogue": "Hi."}, {"id": "b", "dialogue": "Oh."}]
    if kind == "columns":
        rows = [row | {f"summary{n}": f"{row['id']}{n}" for n in (1, 2)} for row in given]
        settings = {"summary_column": ["summary1", "summary2"]}
    else:
        rows, settings = [row | {"summary": [f"{row['id']}1", f"{row['id']}2"]} for row in given], {}
    file = str(write_rows(tmp_path / "rows.jsonl", rows))
    scored = load_rows(EvaluationConfig(test_file=file, **settings), "test")
    assert [(row["id"], row["references"]) for row in scored] == [("a", ["a1", "a2"]), ("b", ["b1", "b2"])]
    assert [dialogue["references"] for dialogue in group_by_dialogue(scored)] == [["a1", "a2"], ["b1", "b2"]]
    trained = load_rows(TrainingConfig(train_file=file, **settings), "train")
    assert [row["summary"] for row in trained] == ["a1", "b1"]
    settings["train_on_all_references"] = True
    trained = load_rows(TrainingConfig(train_file=file, **settings), "train")
    assert [(row["id"], row["summary"]) for row in trained] == [("a", "a1"), ("a", "a2"), ("b", "b1"), ("b", "b2")]
    assert len(load_rows(TrainingConfig(train_file=file, **settings), "train", 1)) == 2, "the first row, with both"
