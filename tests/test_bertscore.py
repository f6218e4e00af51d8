"""BERTScore by encoders of random weights, against greedy matching worked out from their embeddings."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import make_rows, run_script, write_rows
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoModel,
    AutoTokenizer,
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    BertTokenizer,
    RobertaConfig,
    RobertaModel,
    RobertaTokenizer,
)

import utils.scoring.metrics.bertscore
from utils.config import EvaluationConfig, UserError
from utils.scoring.metrics.bertscore import choose_layer, describe_encoder, estimate_bertscore, load_encoder
from utils.scoring.metrics.bertscore import score_with_encoder as score

CPU = torch.device("cpu")
SHAPE = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64)
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the cat sat on a mat dog ran monday friday station park can will you".split()


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Folders of a BERT and a RoBERTa of three layers; the BERT's tokenizer does not say how long a text may be."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoders")
    BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, **SHAPE)).save_pretrained(folder / "bert")
    BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)}).save_pretrained(folder / "bert")
    characters = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(ByteLevel.alphabet())]
    settings = RobertaConfig(vocab_size=len(characters), max_position_embeddings=64, pad_token_id=1, **SHAPE)
    RobertaModel(settings).save_pretrained(folder / "roberta")
    vocabulary = {character: index for index, character in enumerate(characters)}
    RobertaTokenizer(vocab=vocabulary, merges=[], model_max_length=62).save_pretrained(folder / "roberta")
    return folder


def load(folder, num_layers=2):
    pytest.importorskip("bert_score", reason="the optional package of requirements-bertscore.txt is not installed")
    return load_encoder(EvaluationConfig(bertscore=str(folder), bertscore_num_layers=num_layers))


def greedy_f1(folder, text: str, reference: str, layer: int = 2) -> float:
    """By the whole model's hidden states: each token of one text is matched with the nearest of the other, the first
    and the last token, which are no words, with a weight of 0."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    states = []
    for one in (text, reference):
        with torch.no_grad():
            hidden = model(**tokenizer(one, return_tensors="pt"), output_hidden_states=True).hidden_states[layer][0]
        states.append(torch.nn.functional.normalize(hidden.double(), dim=-1).numpy())
    similarity = states[0] @ states[1].T
    precision, recall = similarity.max(axis=1)[1:-1].mean(), similarity.max(axis=0)[1:-1].mean()
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_scores_are_those_of_greedy_matching(encoders, kind):
    encoder = load(encoders / kind)
    texts = {"a": ["the cat sat on a mat", "", " a dog ran\n"], "b": ["the cat", "a dog", "the mat sat"]}
    references = [["the cat sat on a mat", "a cat ran"], ["the dog"], ["a dog ran", ""]]
    scores = score(encoder, texts, references, CPU)
    blank = " " * (kind == "roberta")  # before its first word, as before every other
    for name, of_model in texts.items():
        for text, of_dialogue, values in zip(of_model, references, scores[name], strict=True):
            expected = [
                greedy_f1(encoders / kind, blank + text.strip(), blank + reference) if text and reference else 0
                for reference in of_dialogue
            ]
            assert values == pytest.approx(expected, abs=2e-6)
    assert scores["a"][0][0] == scores["a"][2][0] == 1 and scores["a"][1] == [0] and scores["b"][2][1] == 0
    assert 0 < scores["b"][0][1] < 1


def test_batches_do_not_matter(encoders, monkeypatch):
    encoder = load(encoders / "bert")
    references = [[row["summary"].lower(), row["dialogue"][:50]] for row in make_rows(40)]
    texts = {"m": [row[0][:30] for row in references], "n": [row[1] for row in references]}
    whole = score(encoder, texts, references, CPU)
    monkeypatch.setattr(utils.scoring.metrics.bertscore, "CHUNK_SIZE", 3)
    monkeypatch.setattr(utils.scoring.metrics.bertscore, "BATCH_SIZE", 2)
    for name, values in score(encoder, texts, references, CPU).items():
        assert np.allclose(np.array(values), np.array(whole[name]), rtol=0, atol=2e-6)


def test_long_texts_and_odd_ones(encoders, flan_t5):
    for folder in (encoders / "bert", encoders / "roberta", flan_t5):
        texts = ["the cat " * 100, "\u200b", "中文 🙂", "[SEP] </s>", "the"]
        values = score(load(folder, 1), {"m": texts}, [[text, "the dog"] for text in texts], CPU)["m"]
        assert values[0][0] == values[4][0] == 1 and all(0 <= one <= 1 for pair in values for one in pair), folder


def test_means_and_intervals():
    estimates = estimate_bertscore([[0.9, 0.6], [0.3], [0.6, 0.8]])
    assert {name: entry["value"] for name, entry in estimates.items()} == pytest.approx(
        {"average": 3.2 / 5, "max": 2.0 / 3, "first": 1.8 / 3}
    )
    assert all(entry["low"] < entry["value"] < entry["high"] <= 1 for entry in estimates.values())
    assert estimate_bertscore([[1.0], [1.0]])["max"] == {"value": 1, "low": 1, "high": 1}


def test_the_layer(encoders):
    pytest.importorskip("bert_score", reason="the optional package of requirements-bertscore.txt is not installed")
    settings = BertConfig(num_hidden_layers=24)
    assert choose_layer(EvaluationConfig(bertscore="roberta-large"), settings) == 17
    assert choose_layer(EvaluationConfig(bertscore="roberta-large", bertscore_num_layers=24), settings) == 24
    assert [len(load(encoders / "bert", number).model.encoder.layer) for number in (1, 3)] == [1, 3]
    with pytest.raises(
        UserError, match="bert: bert_score knows no best layer of it; choose one of its 3 with --berts"
    ):
        load(encoders / "bert", None)
    with pytest.raises(UserError, match="--bertscore_num_layers 4: .*bert has 3 layers"):
        load(encoders / "bert", 4)


def test_it_is_an_extra(encoders, monkeypatch):
    assert describe_encoder(EvaluationConfig()) is None
    monkeypatch.setattr(utils.scoring.metrics.bertscore.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="bert_score is not installed; pip install -r requirements-bertscore.txt"):
        load_encoder(EvaluationConfig(bertscore=str(encoders / "bert"), bertscore_num_layers=2))
    for settings, message in (
        ({"bertscore": ""}, "--bertscore is empty"),
        ({"bertscore_num_layers": 2}, "--bertscore_num_layers 2 needs --bertscore"),
        ({"bertscore": "bert", "bertscore_num_layers": 0}, "--bertscore_num_layers must be positive, got 0"),
    ):
        with pytest.raises(UserError, match=message):
            EvaluationConfig(**settings)


def test_encoders_that_cannot_be_used(encoders, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--bertscore .*none: no such folder"):
        load(tmp_path / "none")
    bart = BartConfig(
        vocab_size=len(WORDS), d_model=16, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=20,
    )  # fmt: skip
    BartModel(bart).save_pretrained(shutil.copytree(encoders / "bert", tmp_path / "bart"))
    assert [len(load(tmp_path / "bart", number).model.layers) for number in (1, 2)] == [1, 2]
    with monkeypatch.context() as patch, pytest.raises(UserError, match="a bert cannot be cut to 2 layers here"):
        whole = AutoModel.from_pretrained(encoders / "bert")
        patch.setattr(utils.scoring.metrics.bertscore, "load_quietly", lambda name, settings: (whole, set()))
        load(encoders / "bert", 2)
    short = shutil.copytree(encoders / "bert", tmp_path / "short")
    settings = json.loads((short / "tokenizer_config.json").read_text())
    (short / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 4000}))
    with pytest.raises(UserError, match="cannot be loaded as an encoder: "):
        load(short)
    spoiled = shutil.copytree(encoders / "bert", tmp_path / "spoiled")
    weights = load_file(spoiled / "model.safetensors")
    weights["embeddings.LayerNorm.weight"].fill_(float("nan"))
    save_file(weights, spoiled / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="its embeddings are not finite"):
        load(spoiled)
    unpadded = shutil.copytree(encoders / "bert", tmp_path / "unpadded")
    (unpadded / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": None}))
    with pytest.raises(UserError, match="its tokenizer has no padding token"):
        load(unpadded)
    typed = shutil.copytree(encoders / "bert", tmp_path / "typed")
    settings = json.loads((typed / "config.json").read_text())
    (typed / "config.json").write_text(json.dumps(settings | {"hidden_size": "wide"}))
    with pytest.raises(UserError, match="cannot be loaded as an encoder: .*hidden_size"):
        load(typed)
    with pytest.raises(UserError, match="not in the cache .*AutoModel.from_pretrained"):
        load("no/encoder")
    broken = shutil.copytree(encoders / "bert", tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    lacking = {name: tensor for name, tensor in weights.items() if "layer.0.attention.self.query" not in name}
    save_file(lacking, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="its weights lack .*layer.0.attention.self.query.bias"):
        load(broken)
    settings = json.loads((broken / "config.json").read_text())
    own_code = settings | {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}}
    (broken / "config.json").write_text(json.dumps(own_code))
    (broken / "own.py").write_text(f"open({str(tmp_path / 'was run')!r}, 'w')")
    with pytest.raises(UserError, match="these scripts never run an? encoder's code"):
        load(broken)
    assert not (tmp_path / "was run").exists()
    (broken / "config.json").write_text(json.dumps(settings))
    (broken / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded as an encoder: "):
        load(broken)


@pytest.mark.slow
def test_an_evaluation(encoders, tmp_path):
    """Scores, table and page; the same evaluation, repeated, is the same only with the same encoder."""
    pytest.importorskip("bert_score", reason="the optional package of requirements-bertscore.txt is not installed")
    encoder, rows, out = shutil.copytree(encoders / "bert", tmp_path / "bert"), make_rows(5), tmp_path / "out"
    files = {"rows": write_rows(tmp_path / "rows.jsonl", rows)}
    for name, length in (("whole", None), ("half", 12)):
        lines = [{"id": row["id"], "prediction": row["summary"][:length]} for row in rows]
        files[name] = write_rows(tmp_path / f"{name}.jsonl", lines)

    def evaluate(*words, num_layers=2):
        return run_script(
            "evaluate_rouge.py", "--test_file", files["rows"], "--output_dir", out, "--predictions_file",
            files["whole"], files["half"], "--bertscore", encoder, "--bertscore_num_layers", num_layers, *words,
        )  # fmt: skip

    run = evaluate()
    assert run.returncode == 0, run.stderr
    results = json.loads((out / "results.json").read_text())
    assert results["bertscore"] == describe_encoder(
        EvaluationConfig(bertscore=str(encoder), bertscore_num_layers=2)
    ) and results["bertscore"]["num_layers"] == 2  # fmt: skip
    whole, half = (results["models"][name]["bertscore"] for name in ("whole", "half"))
    assert whole["average"] == {"value": 1, "low": 1, "high": 1} and half["max"]["low"] < half["max"]["value"] < 1
    title = f"BERTScore F1 in percent [95 % interval] by {encoder}, layer 2, bert_score "
    assert title in run.stdout and "| whole | 100.00 \\[100.0, 100.0\\] |" in (out / "report.md").read_text()
    assert title in (out / "report.html").read_text()
    again = evaluate()
    assert (again.returncode, again.stdout) == (0, run.stdout), again.stderr
    assert "holds this evaluation, finished" in again.stderr
    assert "holds a run already" in evaluate(num_layers=1).stderr
    weights = load_file(encoder / "model.safetensors")
    weights["encoder.layer.0.output.dense.bias"] += 1
    save_file(weights, encoder / "model.safetensors", metadata={"format": "pt"})
    refused = evaluate()
    assert (refused.returncode, "the encoder of --bertscore has changed" in refused.stderr) == (2, True)
