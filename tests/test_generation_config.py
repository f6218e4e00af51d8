"""A model's own generation_config.json: followed as generate() does, named where it is not, refused where a value is
impossible."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import make_rows, run_script, write_rows
from families import NUM_TOKENS, decode_here_and_there, write_family
from transformers import AutoTokenizer

from utils.config import EvaluationConfig, UserError
from utils.generation.decoding import decode_batch
from utils.generation.summaries import generate_summaries
from utils.modeling.loading import load_model

FILE = "generation_config.json"
# Settings that another round of decoding must not begin anew, and others.
COUNTED = {
    "min_length": 9,
    "min_new_tokens": 7,
    "begin_suppress_tokens": list(range(0, NUM_TOKENS, 2)),
    "exponential_decay_length_penalty": [4, 1.5],
}
OTHERS = {
    "forced_bos_token_id": 17,
    "forced_eos_token_id": 1,
    "no_repeat_ngram_size": 2,
    "repetition_penalty": 3,
    "suppress_tokens": list(range(0, NUM_TOKENS, 2)),
    "bad_words_ids": [[number] for number in range(0, NUM_TOKENS, 5)],
    "sequence_bias": [[[number], -9.5] for number in range(0, NUM_TOKENS, 5)],
}


@pytest.fixture(scope="module")
def steep(tmp_path_factory) -> Path:
    return write_family(tmp_path_factory.mktemp("models") / "steep", "t5", steep=True)


@pytest.fixture(scope="module")
def plain(steep) -> dict[int, list[list[int]]]:
    """Its texts, by the number of beams, without a setting."""
    return {num_beams: decode_here_and_there(steep, num_beams=num_beams)[0] for num_beams in (1, 3)}


def give(model: Path, folder: Path, **settings) -> Path:
    """A copy of the model with these settings in its file."""
    shutil.copytree(model, folder)
    (folder / FILE).write_text(json.dumps(json.loads((folder / FILE).read_text()) | settings))
    return folder


@pytest.mark.parametrize(
    ("name", "more"),
    [
        *(pytest.param(name, {}, id=name) for name in COUNTED),
        *(pytest.param(name, {}, marks=pytest.mark.slow, id=name) for name in OTHERS),
        # Where the token that is forced counts, or would be forbidden.
        *(pytest.param(name, {"forced_bos_token_id": 17}, marks=pytest.mark.slow, id=f"{name}-forced")
          for name in ("min_length", "begin_suppress_tokens", "repetition_penalty", "suppress_tokens")),
    ],
)  # fmt: skip
def test_a_setting_is_followed_as_generate_follows_it(steep, plain, tmp_path, name, more):
    value = (COUNTED | OTHERS)[name]
    folder = give(steep, tmp_path / "own", **more | {name: value})
    stock = float(value) if name == "repetition_penalty" else value  # generate() itself takes 3.0 alone
    stock = give(steep, tmp_path / "stock", **more | {name: stock})
    for num_beams in (1, 3):
        here, there = decode_here_and_there(folder, stock, num_beams=num_beams)
        assert here == there
        assert more or here != plain[num_beams]


def test_settings_that_are_not_followed_are_named(steep, tmp_path, caplog):
    own = {"num_beams": 4, "do_sample": True, "top_k": 7, "guidance_scale": 2.0, "encoder_no_repeat_ngram_size": 3}
    # None of these would change a text.
    settings = {"length_penalty": 1.0, "max_new_tokens": 7, "temperature": None, "no_repeat_ngram_size": 3}
    settings |= {"_from_model_config": True, "transformers_version": "4.2", "output_scores": True}
    settings |= {"output_attentions": True, "use_cache": False}
    texts = {}
    for name, given in (("own", own | settings), ("plain", {"no_repeat_ngram_size": 3})):
        folder = give(steep, tmp_path / name, **given)
        model, tokenizer = load_model(str(folder), "sdpa", torch.float32), AutoTokenizer.from_pretrained(folder)
        config = EvaluationConfig(max_new_tokens=12, dtype="fp32", output_dir=str(tmp_path / "out" / name))
        dialogues = [row["dialogue"] for row in make_rows(5)]
        caplog.clear()
        with caplog.at_level(logging.INFO, "utils"):
            texts[name] = generate_summaries(Accelerator(), model, tokenizer, dialogues, config, name, {}, "")
        named = [line for line in caplog.messages if "not used" in line]
        expected = f"own: not used of its own generation settings: {', '.join(sorted(own))}"
        assert named == [expected] * (name == "own")
    assert texts["own"] == texts["plain"]


HOSTILE = [
    ("min_length", "many", 'is "many", and must be a whole number, not negative'),
    ("no_repeat_ngram_size", -2, "is -2, and must be a whole number, not negative"),
    ("min_new_tokens", True, "is true, and must be a whole number, not negative"),
    ("eos_token_id", [], "is [], and must be a token's number below 331, or a list of them"),
    ("eos_token_id", [1, 331], "is [1, 331], and must be a token's number below 331, or a list of them"),
    ("decoder_start_token_id", -1, "is -1, and must be a token's number below 331"),
    ("forced_bos_token_id", 331, "is 331, and must be a token's number below 331"),
    ("pad_token_id", "0", 'is "0", and must be a token\'s number below 331'),
    ("suppress_tokens", 5, "is 5, and must be a list of numbers, each a token's number below 331"),
    ("bad_words_ids", [[]], "is [[]], and must be a list of lists of numbers, each a token's number below 331"),
    ("sequence_bias", {}, "is {}, and must be a list of [[numbers, each a token's number below 331], number]"),
    ("repetition_penalty", 0, "is 0, and must be a number above 0"),
    ("repetition_penalty", float("nan"), "is NaN, and must be a number above 0"),
    ("exponential_decay_length_penalty", [5, "2"], 'is [5, "2"], and must be [a whole number, a number above 0]'),
    ("early_stopping", "soon", 'is "soon", and must be true, false or "never"'),
    ("renormalize_logits", 1, "is 1, and must be true or false"),
    ("num_return_sequences", 3, "is 3, and must be 1: a dialogue has one summary"),
    ("repetition_penalty", 10**400, f"is 1{'0' * 79}, and must be a number above 0"),
    ("source_prefix", 5, "is 5, and must be a text"),
    ("source_suffix", "\ud800", 'is "\\ud800", and must be a text'),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "words"), HOSTILE)
def test_a_value_that_cannot_be_meant(steep, tmp_path, name, value, words):
    folder = give(steep, tmp_path / "own", **{name: value})
    with pytest.raises(UserError) as error:
        load_model(str(folder), "sdpa", torch.float32, "model")
    assert str(error.value) == f"--model {folder}: {FILE}: {name} {words}"


def test_settings_that_contradict_each_other(steep, tmp_path):
    folder = give(steep, tmp_path / "own", forced_eos_token_id=7, suppress_tokens=[7])
    with pytest.raises(UserError, match=f"^--model {folder}: {FILE}: .*.*`suppress_tokens`[^\\n]*$"):
        load_model(str(folder), "sdpa", torch.float32, "model")


def test_settings_that_lack_another(steep, tmp_path):
    for name, (settings, words) in {
        "prompt": (
            {"source_prefix": "Sum up: "},
            "source_prefix and source_suffix belong together, and one is missing",
        ),
        "decay": (
            {"exponential_decay_length_penalty": [3, 1.2], "eos_token_id": None},
            "exponential_decay_length_penalty needs an eos_token_id",
        ),
    }.items():
        folder = give(steep, tmp_path / name, **settings)
        with pytest.raises(UserError, match=f"^--model {folder}: {FILE}: {words}$"):
            load_model(str(folder), "sdpa", torch.float32, "model")


def test_a_text_of_nothing_but_ends(steep, tmp_path):
    """With beams generate() itself fails on it."""
    folder = give(steep, tmp_path / "own", eos_token_id=list(range(NUM_TOKENS)))
    model = load_model(str(folder), "sdpa", torch.float32).eval()
    for num_beams in (1, 3):
        ((ids, truncated),) = decode_batch(model, [[5, 6, 1]], EvaluationConfig(num_beams=num_beams))
        assert len(ids) == 1 and not truncated


@pytest.mark.parametrize("content", ["", "[]", "null", "{", '{"a":' * 10_000])
def test_a_file_that_holds_no_settings(steep, tmp_path, content):
    folder = give(steep, tmp_path / "own")
    (folder / FILE).write_text(content)
    with pytest.raises(
        UserError, match=f"^--model {folder}: {FILE} (is not JSON: .+|holds a .+, not settings by name)$"
    ):
        load_model(str(folder), "sdpa", torch.float32, "model")


@pytest.mark.slow
def test_the_mistake_is_the_only_line(steep, data_files, tmp_path):
    folder = give(steep, tmp_path / "own", min_length="many")
    texts = write_rows(tmp_path / "texts.jsonl", [{"dialogue": "Hi."}])
    for words in (
        ("evaluate_rouge.py", "--models", f"a={folder}", "--test_file", data_files["test"], "--output_dir",
         tmp_path / "report"),
        ("summarize.py", "--model", folder, "--input_file", texts, "--output_file", tmp_path / "out.csv"),
    ):  # fmt: skip
        run = run_script(*words)
        assert run.returncode == 2
        assert run.stderr.endswith(f'{FILE}: min_length is "many", and must be a whole number, not negative\n')
        assert run.stderr.count("\n") == 1


def remove(folder: Path, file: str, name: str):
    settings = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(settings | {name: None}))


def test_the_token_that_starts_a_text(tmp_path):
    """As generate() finds it; what one config lacks, the other has."""
    folder = write_family(tmp_path / "model", "bart")
    remove(folder, FILE, "decoder_start_token_id")
    model = load_model(str(folder), "sdpa", torch.float32)
    assert (model.generation_config.decoder_start_token_id, model.config.decoder_start_token_id) == (2, 1)  # bos
    remove(folder, FILE, "bos_token_id")
    model = load_model(str(folder), "sdpa", torch.float32)
    assert (model.generation_config.decoder_start_token_id, model.config.decoder_start_token_id) == (1, 1)
    remove(folder, "config.json", "decoder_start_token_id")
    with pytest.raises(UserError, match=": config.json has no decoder_start_token_id, with which every"):
        load_model(str(folder), "sdpa", torch.float32)
    (folder / FILE).write_text(json.dumps({"decoder_start_token_id": 7}))
    assert load_model(str(folder), "sdpa", torch.float32).config.decoder_start_token_id == 7
    remove(folder, "config.json", "pad_token_id")
    with pytest.raises(UserError, match=": config.json: pad_token_id is None, and must be a token's number below"):
        load_model(str(folder), "sdpa", torch.float32)
