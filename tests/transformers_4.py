"""Folders written here, loaded by transformers 4.57: the same tokens, loss and generated text. Run by hand, since it
installs another version of the library into a virtual environment of its own (some minutes, and a package registry):

python tests/transformers_4.py
"""

import json
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

OTHER_VERSION = "transformers==4.57.*"
BOUND = 1e-6  # relative; both compute in fp32 with the same torch


def measure(folders: list[str]):
    """Print, as JSON, this version and each folder's tokens and loss on a dialogue, with no part of this project."""
    text, summary = (
        "#Person1#: Can you lend me the tent?\n#Person2#: On Friday.",
        "#Person2# lends the tent on Friday.",
    )
    found = {}
    for folder in folders:
        tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
        inputs = tokenizer(f"Summarize the following conversation.\n{text}\nSummary:", return_tensors="pt")
        labels = tokenizer(text_target=summary, return_tensors="pt").input_ids
        with torch.no_grad():
            loss = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, labels=labels).loss
            ids = model.generate(**inputs, generation_config=GenerationConfig.from_pretrained(folder))[0].tolist()
        tokens = [*inputs.input_ids[0].tolist(), *labels[0].tolist(), *ids]
        found[Path(folder).name] = {"tokens": tokens, "loss": loss.item()}
    print(json.dumps({"version": transformers.__version__, "found": found}))  # noqa: T201  read by the other process


def train_all(folder: Path) -> list[Path]:
    """What the scripts leave, of a full model, of adapters and of merged ones, also of BART."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from conftest import make_rows, run_script, write_flan_t5, write_rows
    from helpers import build_t5_tokenizer, write_bart, write_t5

    rows = write_rows(folder / "train.jsonl", make_rows(40))
    models = {name: folder / name for name in ("flan", "old", "mt5", "bart")}
    tokenizer = build_t5_tokenizer()
    # As the hub's: what the head takes is scaled where it is the embedding, and not where it has weights of its own.
    write_flan_t5(models["flan"], vocab_size=len(tokenizer), tie_word_embeddings=False)
    tokenizer.save_pretrained(models["flan"])
    write_t5(models["old"], T5ForConditionalGeneration, T5Config, True, "relu")
    write_t5(models["mt5"], MT5ForConditionalGeneration, MT5Config, False, "gated-gelu")
    write_bart(models["bart"])
    common = ["--train_file", rows, "--max_train_steps", 3, "--learning_rate", 0.01, "--total_train_batch_size", 8,
              "--max_source_length", 250]  # fmt: skip
    made = []
    for name, kind, words in (
        ("flan_full", "full", []),
        ("flan_lora", "lora", ["--merge_into", folder / "flan_merged"]),
        ("flan_dora", "lora", ["--use_dora", "--use_rslora", "--merge_into", folder / "flan_dora_merged"]),
        ("old_full", "full", []),
        ("mt5_full", "full", []),
        ("bart_full", "full", []),
        ("bart_lora", "lora", ["--lora_target_modules", "q_proj", "v_proj", "--merge_into", folder / "bart_merged"]),
    ):
        model = models[name.partition("_")[0]]
        words = ["--model_name_or_path", model, "--output_dir", folder / name, *words]
        run = run_script(f"train_{kind}.py", *common, *words)
        assert run.returncode == 0, run.stderr
        made += [folder / name, *(word for word in words if isinstance(word, Path) and word.name.endswith("merged"))]
    return made


def make_environment(folder: Path) -> Path:
    """A virtual environment with the other version, and else the packages of the one that runs; its Python."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    path = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    (Path(path.strip()) / "zz_others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    # It also brings the versions of tokenizers and huggingface_hub that it wants.
    subprocess.run([python, "-m", "pip", "install", "-q", OTHER_VERSION], check=True)
    return python


def main():
    with tempfile.TemporaryDirectory() as temporary:
        folders = train_all(Path(temporary))
        there = make_environment(Path(temporary) / "environment")
        results = []
        for python in (sys.executable, there):
            output = subprocess.check_output([python, __file__, "--measure", *folders], text=True)
            results.append(json.loads(output.splitlines()[-1]))
    here, there = results
    differences = {}
    for name, expected in here["found"].items():
        got = there["found"][name]
        same = "the same" if got["tokens"] == expected["tokens"] else "OTHER"
        differences[name] = abs(got["loss"] / expected["loss"] - 1) if same == "the same" else float("inf")
        loss = f"loss {expected['loss']:.7f} and {got['loss']:.7f}, difference {differences[name]:.1e}"
        print(f"{name}: {same} tokens, {loss}")  # noqa: T201  this is what it is run for
    print(f"transformers {here['version']} and {there['version']}")  # noqa: T201
    sys.exit(max(differences.values()) > BOUND)


if __name__ == "__main__":
    measure(sys.argv[2:]) if sys.argv[1:2] == ["--measure"] else main()
