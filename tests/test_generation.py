"""The same summaries on any number of processes and in any batches, nothing computed twice, and none lost."""

import itertools
import json
import os
import tempfile
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import REPOSITORY, make_rows, read_jsonl, run_script, start_script, write_rows
from generation_worker import MODES, load_dialogues, write_unsure_model
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5ForConditionalGeneration
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from warm import KILL

import evaluate_rouge
import utils.files
import utils.scoring.report
from utils.config import EvaluationConfig, UserError
from utils.data.micro_batches import deal
from utils.generation import beams
from utils.generation.decoding import cached_bytes_per_token, decode_batch
from utils.generation.partial_texts import Summary, append_batch, hash_model, read_batches, remove_batches
from utils.generation.summaries import DTYPES, cut_batches, estimate_cost, generate_summaries
from utils.modeling.loading import load_model, load_tokenizer
from utils.prompting import build_prompt

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def unsure_model(tmp_path_factory) -> Path:
    return write_unsure_model(tmp_path_factory.mktemp("unsure"))


def generate(folder: Path, dialogues: list[str], **settings):
    model, tokenizer = load_model(str(folder), "sdpa", torch.float32), load_tokenizer(str(folder))
    with tempfile.TemporaryDirectory() as output_dir:
        config = EvaluationConfig(**({"max_new_tokens": 12, "output_dir": output_dir, "dtype": "fp32"} | settings))
        summaries = generate_summaries(
            Accelerator(), model, tokenizer, dialogues, config, "model", {}, hash_model(model, tokenizer)
        )
        return [summaries[dialogue] for dialogue in dialogues]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [MODES["greedy"], MODES["beams"], {"max_new_tokens": 40}])
def test_summaries_are_those_of_one_prompt_at_a_time(unsure_model, settings):
    dialogues = load_dialogues()
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(unsure_model), AutoTokenizer.from_pretrained(unsure_model)
    expected = []
    for dialogue in dialogues:
        inputs = tokenizer(build_prompt(dialogue), return_tensors="pt").input_ids
        ids = model.generate(inputs, do_sample=False, **({"max_new_tokens": 12} | settings))[0]
        text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        expected.append(Summary(text, tokenizer.eos_token_id not in ids))
    assert len({summary.text for summary in expected}) > 8
    assert {summary.truncated for summary in expected} == {True, False} or settings.get("max_new_tokens") == 40
    for size in (1, 3, 32):
        assert generate(unsure_model, dialogues, per_device_eval_batch_size=size, **settings) == expected


def count_computed(model: T5ForConditionalGeneration) -> tuple[list[int], list[int]]:
    """Lists that grow by what the decoder computes, rows x steps, and by the prompts that the encoder is given."""
    num_computed, num_encoded = [], []
    model.decoder.register_forward_pre_hook(
        lambda _, __, inputs: num_computed.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    model.encoder.register_forward_pre_hook(
        lambda _, __, inputs: num_encoded.append(len(inputs["input_ids"])), with_kwargs=True
    )
    return num_computed, num_encoded


def test_texts_that_have_ended_cost_nothing(unsure_model):
    """Counted where the decoder computes: rows x steps, against the texts' own lengths."""
    model, tokenizer = load_model(str(unsure_model), "sdpa", torch.float32).eval(), load_tokenizer(str(unsure_model))
    prompts = tokenizer([build_prompt(dialogue) for dialogue in load_dialogues()]).input_ids
    num_computed, num_encoded = count_computed(model)
    decoded = decode_batch(model, prompts, EvaluationConfig(max_new_tokens=40))
    lengths = [len(ids) for ids, _ in decoded]
    num_tokens, num_in_one_go = sum(lengths), len(lengths) * max(lengths)
    assert num_tokens < 0.6 * num_in_one_go, "texts of about one length prove nothing"
    assert num_tokens <= sum(num_computed) < 1.15 * num_tokens
    assert sum(num_encoded) == len(prompts)


@pytest.mark.slow
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize(
    ("num_beams", "length_penalty", "generation_settings"),
    [
        (2, 0.0, {}),
        (3, 1.0, {}),
        (5, -1.0, {}),
        (5, 2.0, {}),
        (3, 1.0, {"eos_token_id": [1, 5], "no_repeat_ngram_size": 2}),
        (5, -1.0, {"eos_token_id": [1, 5], "no_repeat_ngram_size": 2}),
    ],
)
def test_beam_search_is_that_of_transformers(
    unsure_model, monkeypatch, early_stopping, num_beams, length_penalty, generation_settings
):
    """Its texts, though prompts leave the batch, and hardly more computed than with each prompt in a batch of its own,
    whose search ends when it is over; what a prompt's beams have in common is computed and kept once."""
    model, tokenizer = load_model(str(unsure_model), "sdpa", torch.float32).eval(), load_tokenizer(str(unsure_model))
    model.generation_config.update(early_stopping=early_stopping, **generation_settings)
    prompts = tokenizer([build_prompt(dialogue) for dialogue in load_dialogues()[-12:][::-1]]).input_ids
    num_computed, num_encoded = count_computed(model)
    settings = {"num_beams": num_beams, "length_penalty": length_penalty, "max_new_tokens": 20}
    attended = []  # rows of queries and of keys, and queries in a row

    def attend(module, query, key, *arguments, **kwargs):
        attended.append((len(query), len(key), query.shape[2]))
        return sdpa_attention_forward(module, query, key, *arguments, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(beams, "sdpa_attention_forward", attend)
        decoded = decode_batch(model, prompts, EvaluationConfig(**settings))
    assert (len(prompts), len(prompts), num_beams) in attended
    num_tokens = sum(num_computed)
    assert sum(num_encoded) == len(prompts)
    num_computed.clear()
    alone = [model.generate(torch.tensor([ids]), do_sample=False, **settings)[0, 1:].tolist() for ids in prompts]
    assert [ids for ids, _ in decoded] == alone
    first_tokens = (num_beams - 1) * len(prompts)
    assert sum(num_computed) - first_tokens <= num_tokens < 1.1 * sum(num_computed)


@pytest.mark.slow
def test_a_lower_limit_cuts_the_same_texts(unsure_model):
    model, tokenizer = load_model(str(unsure_model), "sdpa", torch.float32).eval(), load_tokenizer(str(unsure_model))
    prompts = tokenizer([build_prompt(dialogue) for dialogue in load_dialogues()]).input_ids
    whole = decode_batch(model, prompts, EvaluationConfig(max_new_tokens=24))
    for limit in range(1, 24):
        cut = [(ids[:limit], truncated or len(ids) > limit) for ids, truncated in whole]
        assert decode_batch(model, prompts, EvaluationConfig(max_new_tokens=limit)) == cut


def test_a_repeated_dialogue_is_generated_once(flan_t5, monkeypatch):
    dialogues = [row["dialogue"] for row in make_rows(5)]
    num_prompts = []
    original = T5ForConditionalGeneration.generate

    def count(model, **inputs):
        num_prompts.append(len(inputs["attention_mask"]))
        return original(model, **inputs)

    monkeypatch.setattr(T5ForConditionalGeneration, "generate", count)
    assert generate(flan_t5, dialogues * 3) == generate(flan_t5, dialogues) * 3
    assert num_prompts == [5, 5]


def test_batches_are_bounded_by_tokens_and_hold_each_prompt_once():
    lengths = [*range(20, 1020, 2), 1000]
    for size, num_beams, shared in itertools.product((4, 32), (1, 4), (False, True)):
        config = EvaluationConfig(per_device_eval_batch_size=size, num_beams=num_beams, max_new_tokens=24)
        batches = cut_batches(lengths, config, CPU, shared=shared)
        assert sorted(itertools.chain(*batches)) == list(range(501))
        longest = [max(lengths[index] for index in batch) for batch in batches]
        assert longest == sorted(longest, reverse=True)
        num_copies = 1 if shared else num_beams
        per_prompt = [num_copies * top + num_beams * 24 for top in longest]
        tokens = [len(batch) * cached for batch, cached in zip(batches, per_prompt, strict=True)]
        assert max(tokens) <= max(size * (1018 + 24), per_prompt[0])
    assert len(cut_batches(lengths[:20], EvaluationConfig(), CPU)) == 1  # few prompts are not torn apart


def test_batches_on_a_gpu_are_as_large_as_memory_allows():
    lengths, gpu = [*range(20, 1020, 2)], torch.device("cuda")
    assert len(cut_batches(lengths, EvaluationConfig(max_new_tokens=24), gpu, 10**6)) == 1
    for num_beams, num_copies in ((1, 1), (4, 4), (4, 1)):
        config = EvaluationConfig(max_new_tokens=24, num_beams=num_beams)
        batches = cut_batches(lengths, config, gpu, 100_000, shared=num_copies < num_beams)
        longest = [max(lengths[index] for index in batch) for batch in batches]
        tokens = [
            len(batch) * (num_copies * top + num_beams * 24) for batch, top in zip(batches, longest, strict=True)
        ]
        assert all(80_000 < num_tokens <= 100_000 for num_tokens in tokens[:-1]) and tokens[-1] <= 100_000


def test_a_cached_token(flan_t5):
    """Two layers' keys and values of 4 heads of 8."""
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        assert cached_bytes_per_token(load_model(str(flan_t5), "sdpa", dtype)) == 2 * 2 * 4 * 8 * size


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_dtype_is_that_of_all_weights(flan_t5, monkeypatch, dtype):
    found = set()
    original = T5ForConditionalGeneration.generate

    def watch(model, **inputs):
        found.update(parameter.dtype for parameter in model.parameters())
        return original(model, **inputs)

    monkeypatch.setattr(T5ForConditionalGeneration, "generate", watch)
    dialogues = [row["dialogue"] for row in make_rows(3)]
    texts = generate(flan_t5, dialogues, dtype=dtype, per_device_eval_batch_size=1)
    assert found == {DTYPES[dtype]}
    stock, tokenizer = T5ForConditionalGeneration.from_pretrained(flan_t5), AutoTokenizer.from_pretrained(flan_t5)
    stock = stock.to(DTYPES[dtype]).eval()
    for dialogue, summary in zip(dialogues, texts, strict=True):
        inputs = tokenizer(build_prompt(dialogue), return_tensors="pt")
        (ids,) = original(stock, **inputs, do_sample=False, max_new_tokens=12)
        assert summary.text == tokenizer.decode(ids, skip_special_tokens=True).strip()


@pytest.mark.parametrize("num_processes", [2, 4, 8, 16])
def test_processes_get_shares_of_equal_cost(num_processes):
    lengths = list(range(60, 660, 2))
    config = EvaluationConfig()
    batches = cut_batches(lengths, config, CPU)
    assert len(batches) == 16
    costs = [estimate_cost([lengths[index] for index in batch], config) for batch in batches]
    shares = [deal(list(range(16)), costs, rank, num_processes) for rank in range(num_processes)]
    assert sorted(itertools.chain(*shares)) == list(range(16))
    of_ranks = [sum(costs[number] for number in share) for share in shares]
    assert max(of_ranks) < 1.06 * sum(of_ranks) / num_processes


@pytest.mark.slow
def test_one_two_and_three_processes_give_the_same_texts(unsure_model, tmp_path):
    results, keys = [], {}
    for num_processes in (1, 2, 3):
        folder = tmp_path / str(num_processes)
        folder.mkdir()
        run = run_script(
            "tests/generation_worker.py", unsure_model, folder,
            num_processes=num_processes, PYTHONPATH=os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")]),
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        results.append(json.loads((folder / "results.json").read_text()))
        for mode in MODES:  # each process had a share, and the batches are the same
            files = list((folder / mode).glob("predictions.partial-*.jsonl"))
            assert len(files) == num_processes
            lines = [line for path in files for line in path.read_text().split("\n") if line]
            keys.setdefault(mode, []).append(sorted(json.loads(line)["key"] for line in lines))
    assert all(len(one) >= 5 and one == two == three for one, two, three in keys.values())
    assert [result.pop("num_processes") for result in results] == [1, 2, 3]
    assert results[0] == results[1] == results[2]
    greedy, beams = ([text for text, *_ in results[0][mode]] for mode in MODES)
    assert greedy != beams


@pytest.mark.slow
def test_one_and_two_processes_write_the_same(flan_t5, data_files, tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for num_processes, folder in enumerate(folders, start=1):
        run = run_script(
            "evaluate_rouge.py", "--models", f"a={flan_t5}", f"b={flan_t5}", "--test_file", data_files["test"],
            "--per_device_eval_batch_size", 1, "--max_new_tokens", 12, "--output_dir", folder,
            num_processes=num_processes,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        assert not list(folder.glob("*.partial*"))
    one, two = ((folder / "predictions.jsonl").read_text() for folder in folders)
    assert one == two
    results = [json.loads((folder / "results.json").read_text()) for folder in folders]
    assert [result["num_processes"] for result in results] == [1, 2]
    assert results[0]["models"] == results[1]["models"] and results[0]["comparisons"] == results[1]["comparisons"]
    predictions = read_jsonl(folders[0] / "predictions.jsonl")
    assert [(row["id"], row["model"], len(row["references"]), row["truncated"]) for row in predictions] == [
        (f"test_{index}_1", model, 3, True) for model in ("a", "b") for index in range(4)
    ]
    difference = results[0]["comparisons"]["a_vs_b"]["max"]["rougeL"]
    assert (difference["difference"], difference["low"], difference["high"]) == (0, 0, 0)


@pytest.mark.slow
def test_a_killed_generation_resumes(unsure_model, tmp_path):
    def command(output_dir: Path, *words: str) -> list[str]:
        return [
            "evaluate_rouge.py", "--demo", "--models", f"a={unsure_model}", "b=demo/model",
            "--per_device_eval_batch_size", "1", "--max_eval_samples", "60", "--output_dir", str(output_dir), *words,
        ]  # fmt: skip

    whole = run_script(*command(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    assert "from an earlier run" not in whole.stderr
    killed = tmp_path / "killed"
    partial_file = killed / "predictions.partial-0.jsonl"
    process = start_script(*command(killed))
    while not (partial_file.exists() and partial_file.read_text().count('"key"') >= 10):
        assert process.poll() is None, "it was over before it could be killed"
        time.sleep(0.001)
    process.send_signal(KILL)
    process.wait()
    lines = [line for line in partial_file.read_text().split("\n") if line]
    assert len(lines) < 40 and not (killed / "predictions.jsonl").exists()  # 20 prompts, one a batch, twice
    with partial_file.open("a") as file:
        file.write("\n" + lines[-1][:40])  # torn
    num_whole = sum(line.endswith("}") for line in lines)

    # Also with another number of processes: the batches are the same.
    again = run_script(*command(killed), num_processes=2)
    assert again.returncode == 0, again.stderr
    num_kept = sum(int(line.split()[1]) for line in again.stderr.splitlines() if "from an earlier run" in line)
    assert num_kept == num_whole
    assert (killed / "predictions.jsonl").read_bytes() == (tmp_path / "whole" / "predictions.jsonl").read_bytes()
    assert not list(killed.glob("*.partial*"))
    # A report of other settings is not replaced unasked.
    refused = run_script(*command(killed, "--max_new_tokens", "7"))
    assert refused.returncode == 2 and "holds a run already" in refused.stderr


def test_a_torn_line_costs_its_own_batch_alone(tmp_path):
    prefix = tmp_path / "predictions.partial"
    append_batch(Accelerator(), prefix, "first", [Summary("a\u2028b", False), Summary("", True)])
    path = tmp_path / "predictions.partial-0.jsonl"
    path.write_bytes(path.read_bytes() + '\n{"key": "torn", "summaries": [["\u00e9'.encode()[:-1])
    append_batch(Accelerator(), prefix, "last", [Summary("c", True)])
    expected = {"first": [Summary("a\u2028b", False), Summary("", True)], "last": [Summary("c", True)]}
    assert read_batches(Accelerator(), prefix) == expected
    path.write_bytes(path.read_bytes().replace(b'"c"', b'"b"'))  # one bit
    assert read_batches(Accelerator(), prefix).keys() == {"first"}
    remove_batches(prefix)
    assert read_batches(Accelerator(), prefix) == {} and not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["max_new_tokens", "weights", "dialogue", "nothing"])
def test_texts_are_taken_up_only_where_the_same_would_come_out(flan_t5, tmp_path, change):
    dialogues = [row["dialogue"] for row in make_rows(3)]
    settings = {"output_dir": str(tmp_path), "per_device_eval_batch_size": 1}
    generate(flan_t5, dialogues, **settings)
    kept = read_batches(Accelerator(), tmp_path / "predictions.partial")
    assert len(kept) == 3
    kept = {key: [summary._replace(text="kept") for summary in batch] for key, batch in kept.items()}
    model, tokenizer = load_model(str(flan_t5), "sdpa", torch.float32), load_tokenizer(str(flan_t5))
    if change == "weights":
        with torch.no_grad():
            model.decoder.block[1].layer[2].DenseReluDense.wo.weight[3, 5] += 1e-6
    elif change == "dialogue":
        dialogues[0] += "!"
    elif change == "max_new_tokens":
        settings["max_new_tokens"] = 13
    config = EvaluationConfig(**({"max_new_tokens": 12, "dtype": "fp32"} | settings))
    texts = generate_summaries(
        Accelerator(), model, tokenizer, dialogues, config, "model", kept, hash_model(model, tokenizer)
    )
    num_kept = sum(summary.text == "kept" for summary in texts.values())
    assert num_kept == {"nothing": 3, "dialogue": 2}.get(change, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length_penalty": 2.0}, "--length_penalty 2.0 needs --num_beams above 1"),
        ({"length_penalty": float("nan"), "num_beams": 2}, "--length_penalty must be between -100 and 100"),
    ],
)
def test_settings_that_cannot_be_meant(settings, message):
    with pytest.raises(UserError) as error:
        EvaluationConfig(**settings)
    assert message in str(error.value)


@pytest.mark.parametrize("from_files", [False, True])
@pytest.mark.parametrize("last", ["predictions.jsonl", "results.json", "report.html"])
def test_an_evaluation_that_ended_between_its_files_goes_on(
    flan_t5, data_files, tmp_path, monkeypatch, from_files, last
):
    """The same command writes what is missing; after that it has nothing to do."""
    rows = read_jsonl(data_files["test"])
    texts = write_rows(tmp_path / "texts.jsonl", [{"id": row["id"], "prediction": "Hi."} for row in rows])
    what = {"predictions_file": [str(texts)]} if from_files else {"models": [f"m={flan_t5}"], "max_new_tokens": 4}
    write_file = utils.files.write_file

    def write_and_end(path: Path, content: bytes):
        write_file(path, content)
        if path.name == last:
            raise InterruptedError

    def evaluate(name: str):
        AcceleratorState._reset_state(True)
        evaluate_rouge.main(
            EvaluationConfig(test_file=str(data_files["test"]), output_dir=str(tmp_path / name), **what)
        )
        names = ("predictions.jsonl", "report.md", "report.html")
        return [(tmp_path / name / file).read_text().replace(f"/{name}", "/out") for file in names]

    expected = evaluate("whole")
    with monkeypatch.context() as patch:
        for module in (utils.files, utils.scoring.report):
            patch.setattr(module, "write_file", write_and_end)
        with pytest.raises(InterruptedError):
            evaluate("cut")
    assert {path.name for path in (tmp_path / "cut").iterdir()} >= {"predictions.jsonl", "predictions.partial-0.jsonl"}
    assert evaluate("cut") == expected
    assert evaluate("cut") == expected
