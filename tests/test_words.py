"""What ROUGE and tokenizers see of a text: the default is rouge_score's own, other scripts have words too, and what
nobody sees is told."""

import json
import string
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from conftest import make_rows, write_rows
from helpers import train_in_process
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer
from transformers import AutoTokenizer

import evaluate_rouge
import train_full
from utils.config import EvaluationConfig, TrainingConfig
from utils.data.unknown import count_unknown, describe_unknown
from utils.modeling.loading import load_tokenizer
from utils.scoring.metrics.diagnostics import describe_notes
from utils.scoring.metrics.rouge import METRICS, score_texts
from utils.scoring.metrics.words import UnicodeTokenizer, share_unseen, split_words

T5_TOKENIZER = Path(__file__).resolve().parent.parent.parent / "shared" / "t5-tokenizer"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("#Person1#: Don't GO_there, 10:30!", ["person1", "don", "t", "go", "there", "10", "30"]),
        ("昨天15点，我去了東京タワー。", [*"昨天", "15", *"点我去了東京タワー"]),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),  # vowel signs are part of a word
        ("ดีครับ", ["ดี", "ค", "รั", "บ"]),
        ("Café Straße", ["café", "straße"]),
        ("Cafe\u0301", ["café"]),
        ("안녕하세요 세계", ["안녕하세요", "세계"]),
        ("Привет, МИР", ["привет", "мир"]),
        (" \n.,!", []),
    ],
)
def test_words_of_any_script(text, words):
    assert split_words(text) == words


@settings(max_examples=300)
@given(st.text(string.printable), st.booleans())
def test_words_of_ascii_are_those_of_rouge_score(text, use_stemmer):
    assert UnicodeTokenizer(use_stemmer).tokenize(text) == DefaultTokenizer(use_stemmer).tokenize(text)


ADVERSARIAL = st.text(st.sampled_from("aAbé5٣中ßİK\u0301\u200d\n\t .#'-_"), max_size=30)


@settings(max_examples=30)
@given(st.lists(st.tuples(ADVERSARIAL, ADVERSARIAL), min_size=1, max_size=10), st.booleans())
def test_default_scores_are_those_of_rouge_score_to_the_last_digit(pairs, use_stemmer):
    scorer = RougeScorer(METRICS, use_stemmer=use_stemmer)
    scores = score_texts([text for text, _ in pairs], [[reference] for _, reference in pairs], use_stemmer)
    for index, (text, reference) in enumerate(pairs):
        expected = scorer.score(reference, text)
        assert all(scores[metric][index] == [expected[metric].fmeasure] for metric in METRICS)


def test_scores_of_other_scripts():
    reference, wrong = "我们15点见面。", "他15岁了！"  # we meet at 15 o'clock; he is 15
    texts, references = [reference, wrong, "Привет, мир"], [[reference], [reference], ["привет мир"]]
    by_default = score_texts(texts, references, use_stemmer=False)["rouge1"]
    assert by_default == [[1.0], [1.0], [0.0]], "all that the default sees is the number"
    scores = score_texts(texts, references, use_stemmer=True, tokenizer="unicode")["rouge1"]
    assert scores == [[1.0], [2 * 1 / (6 + 4)], [1.0]]


def test_share_unseen():
    assert share_unseen(["Ab 1!", "é"]) == 1 / 4
    assert share_unseen([]) == share_unseen(["!"]) == 0
    assert share_unseen(["他15岁了"]) == pytest.approx(3 / 5)


def test_notes():
    def notes(texts: list[str], references: list[str], **settings: object) -> list[str]:
        unknown = {"m": ["it reads nothing"]} if settings.pop("unknown", False) else {}
        return describe_notes(EvaluationConfig(**settings), {"m": texts}, references, unknown)

    one_line = "rougeLsum is rougeL here: every text has one line."
    assert notes(["a"], ["b"]) == [one_line]
    assert notes(["a\nb", "c"], ["b\nc", "d\ne"]) == [
        "rougeLsum compares line by line, and these texts have several lines: 1 of m, 2 of the references."
    ]
    assert notes(["a"], ["b"], rouge_newline=True) == []
    assert notes(["a"], ["b"], unknown=True) == ["m: it reads nothing.", one_line]
    assert notes(["a"], ["abcdefghé"])[0].startswith("ROUGE's default tokenizer drops 11.1% of the letters and digits")
    assert notes(["a"], ["abcdefghé"], rouge_tokenizer="unicode") == [one_line]


def test_unknown_characters(flan_t5):
    tokenizer = load_tokenizer(str(flan_t5))
    found = count_unknown(tokenizer, ["Hi 中you文.", "Hi.", "國中 \n", ""])
    commonest = [("中", 2), ("文", 1), ("國", 1)]
    assert found == {"share_of_texts": 0.5, "share_of_characters": 4 / 13, "commonest": commonest}
    assert count_unknown(tokenizer, []) == {"share_of_texts": 0, "share_of_characters": 0, "commonest": []}
    assert describe_unknown(tokenizer, ["Hi."] * 101, ["Hi."] * 100 + ["中\n"]) == [], "not worth a line"
    dialogues, summaries = describe_unknown(tokenizer, ["Hi 中you文.", "Hi."], ["Hi.", "中"])
    assert dialogues == (
        "the tokenizer has no token for 18.18% of the characters of the dialogues (in 50.0% of them), so a model "
        "cannot read them: 中 1, 文 1"
    )
    assert "for 25.00% of the characters of the summaries (in 50.0% of them), so a model cannot write" in summaries


@pytest.mark.skipif(not T5_TOKENIZER.is_dir(), reason="T5's tokenizer is not beside the project")
def test_unknown_to_t5():
    tokenizer = AutoTokenizer.from_pretrained(T5_TOKENIZER)
    text = "A café {is} <open: 中 e\u0301\n"  # the last is an é, in two characters
    assert dict(count_unknown(tokenizer, [text])["commonest"]) == dict.fromkeys("{}<中", 1)
    assert list(tokenizer(text).input_ids).count(tokenizer.unk_token_id) == 4
    assert describe_unknown(tokenizer, [], ["one\ntwo", "three"]) == [
        "50.0% of the summaries have several lines, and the tokenizer makes a line end a blank"
    ]


def test_what_a_training_and_an_evaluation_say(flan_t5, tmp_path, caplog):
    """A line of each split and of each model, which the report repeats."""
    rows = make_rows(8)
    files = {}
    for split in ("train", "validation"):
        changed = [row | {"summary": row["summary"] + " 中" * (index % 2)} for index, row in enumerate(rows)]
        files[split] = write_rows(tmp_path / f"{split}.jsonl", changed)
    train_in_process(train_full, TrainingConfig, flan_t5, files, tmp_path / "out", max_train_steps=1)
    told = [record for record in caplog.records if "cannot write" in record.getMessage()]
    assert [record.getMessage().split(":")[0] for record in told] == ["train", "validation"]
    assert all("(in 50.0% of them), so a model cannot write them: 中 4" in r.getMessage() for r in told)

    caplog.clear()
    AcceleratorState._reset_state(True)
    evaluate_rouge.main(
        EvaluationConfig(
            models=[f"m={tmp_path / 'out'}"], test_file=str(files["train"]), output_dir=str(tmp_path / "report"),
            max_new_tokens=4, dtype="fp32",
        )
    )  # fmt: skip
    (told,) = [message for message in caplog.messages if "cannot write" in message]
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert f"{told}." in results["conclusions"]
    assert any(note.startswith("ROUGE's default tokenizer drops ") for note in results["conclusions"]) is False
    assert "中 4" in (tmp_path / "report" / "report.md").read_text()
    assert "中 4" in (tmp_path / "report" / "report.html").read_text()
