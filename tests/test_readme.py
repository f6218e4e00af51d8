"""Every command in a README is run by a test: here, or in the test that is named here."""

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from accelerate.commands.launch import launch_command_parser
from conftest import REPOSITORY, make_rows, start_warm_server, warm_launch, write_rows
from transformers import GenerationConfig

from utils.config import EvaluationConfig, LoraTrainingConfig, SummaryConfig, TrainingConfig
from utils.launch.command_line import parse_config
from utils.prompting import DEFAULT_PROMPT

RUN_ELSEWHERE = {
    "test_demo.py": [
        "pip install -r requirements.txt && accelerate launch train_lora.py --demo",  # pip's part: .ci/run
        "accelerate launch train_full.py --demo",
        "accelerate launch evaluate_rouge.py --demo",
        "accelerate launch evaluate_rouge.py --demo --split validation --example_index 29 --max_eval_samples 10 "
        "--output_dir demo-sample",
    ],
    "test_hub.py": [
        "accelerate launch train_full.py",
        "accelerate launch train_lora.py",
        "accelerate launch train_lora.py --resume_from_checkpoint latest",
        "accelerate launch evaluate_rouge.py",
        "HF_HUB_OFFLINE=1 accelerate launch train_lora.py",
    ],
}
# Needs GPUs or more nodes than the tests have: their words are parsed; test_slurm.py runs the same files.
PARSED = {
    "accelerate launch --config_file accelerate_configs/multi_gpu.yaml --num_processes 8 train_full.py",
    "accelerate launch --config_file accelerate_configs/fsdp2.yaml --num_processes 8 train_full.py",
    "accelerate launch --config_file accelerate_configs/deepspeed_zero3.yaml --num_processes 8 train_full.py",
    "accelerate launch --config_file accelerate_configs/multi_node.yaml --num_machines 4 --num_processes 32 "
    "--machine_rank 0 --main_process_ip node0 train_full.py",
    "sbatch slurm/train_lora.sbatch",
    "sbatch --nodes 4 --gpus-per-node 8 slurm/train_lora.sbatch --learning_rate 3e-4",
    "sbatch slurm/evaluate_rouge.sbatch",
    "sbatch slurm/summarize.sbatch --input_file chats.jsonl --output_file summaries.jsonl",
}
CONFIGS = {
    "train_full": TrainingConfig,
    "train_lora": LoraTrainingConfig,
    "evaluate_rouge": EvaluationConfig,
    "summarize": SummaryConfig,
}


PLACES = ("", "accelerate_configs", "demo", "slurm", "tests/benchmarks", "utils")
READMES = {path: path.read_text() for path in (REPOSITORY / place / "README.md" for place in PLACES)}


def readme_commands() -> list[str]:
    """In README.md's order, then those of the others."""
    texts = [READMES[REPOSITORY / "README.md"], *READMES.values()]
    blocks = [block for text in texts for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)]
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return list(dict.fromkeys(line for line in lines if line))


def test_every_command_is_run():
    known = PARSED.union(*RUN_ELSEWHERE.values())
    here = [command for command in readme_commands() if command not in known]
    assert len(here) == 7 and sum("--dialogue_column" in command for command in here) == 4
    assert sum(command.startswith("python -c") for command in here) == 2, "run by test_hub.py"
    assert known <= set(readme_commands())


@pytest.mark.parametrize("command", sorted(PARSED))
def test_words_are_understood(command):
    words = shlex.split(command)
    if words[0] == "accelerate":
        launcher = launch_command_parser().parse_args(words[2:])
        assert (REPOSITORY / launcher.config_file).is_file()
        script, arguments = launcher.training_script, launcher.training_script_args
    else:
        script = next(word for word in words if word.endswith(".sbatch"))
        arguments = words[words.index(script) + 1 :]
    assert (REPOSITORY / script).is_file()
    name = script.removeprefix("slurm/").partition(".")[0]
    parse_config(CONFIGS[name], f"{name}.yaml", arguments)


@pytest.mark.slow
def test_commands_for_own_data(flan_t5, tmp_path):
    """In README's order, with a small model instead of google/flan-t5-base and files of the columns named there."""
    commands = [line for line in readme_commands() if "--dialogue_column" in line or "summarize" in line]
    commands = [command for command in commands if command not in PARSED]
    assert len(commands) == 5
    rows = [{"id": row["id"], "text": row["dialogue"], "gold": row["summary"]} for row in make_rows(12)]
    (tmp_path / "chat.txt").write_text(rows[0]["text"])
    for name in ("train", "dev", "test", "chats"):
        lines = ["id,text,gold", *(f'{row["id"]},"{row["text"]}",{row["gold"]}' for row in rows)]
        text = "\n".join(lines) + "\n"
        (tmp_path / f"{name}.csv").write_text(text.replace("gold", "other") if name == "chats" else text)
    for name in ("texts", "other"):
        write_rows(tmp_path / f"{name}.jsonl", [{"id": row["id"], "prediction": row["gold"]} for row in rows])
    for command in commands:
        command, _, stdin = command.replace("google/flan-t5-base", str(flan_t5)).partition(" < ")
        words = shlex.split(command)
        if words[0] == "python":
            words = [sys.executable, str(REPOSITORY / "tests" / "warm.py"), str(REPOSITORY / words[1]), *words[2:]]
        else:
            assert words[:2] == ["accelerate", "launch"]
            words = [*warm_launch(REPOSITORY / words[2])[0], *words[3:]]
            words += ["--model_name_or_path", str(flan_t5)] if "train" in command else ["--max_new_tokens", "8"]
        environment = os.environ | {"WARM_SOCKET": start_warm_server()}
        with open(tmp_path / stdin if stdin else os.devnull) as file:
            run = subprocess.run(
                words, cwd=tmp_path, env=environment, stdin=file, capture_output=True, text=True, timeout=240
            )
        assert run.returncode == 0, run.stderr
        assert not stdin or len(run.stdout.splitlines()) == 1
    models = json.loads((tmp_path / "their-report" / "results.json").read_text())["models"]
    assert {name: model["scores"]["max"]["rougeLsum"]["value"] for name, model in models.items()} == {
        "texts": 1,
        "theirs": 1,
    }
    with (tmp_path / "summaries.csv").open(newline="") as file:
        assert [row["text"] for row in csv.DictReader(file)] == [row["text"] for row in rows]
    assert set(json.loads((tmp_path / "my-report" / "results.json").read_text())["models"]) == {"original", "mine"}


def test_every_module_is_listed():
    """Each under its wing, and the wings in the order in which they may import."""
    listed, names = [], []
    for line in READMES[REPOSITORY / "utils" / "README.md"].splitlines():
        if match := re.match(r"^( *)(\w+)(/|\.py)(?!\S)", line):
            names = [*names[: len(match[1]) // 2], match[2]]
            listed += ["/".join(names[1:]) + ".py"] if names[0] == "utils" and match[3] == ".py" else []
    modules = {str(path.relative_to(REPOSITORY / "utils")) for path in (REPOSITORY / "utils").rglob("*.py")}
    assert sorted(listed) == sorted(name for name in modules if "__init__" not in name)


def test_settings_named_in_readme_exist():
    known = set().union(*(config.__dataclass_fields__ for config in CONFIGS.values())) | {"config", "help"}
    launcher = {"config_file", "num_processes", "nodes", "gpus-per-node", "array", "signal"}
    launcher |= {"num_machines", "machine_rank", "main_process_ip", "exclude"}
    launcher |= {"partition", "account", "qos", "mem", "export", "container-image"}
    named = set(re.findall(r"(?<![\w-])--([a-z][\w-]+)", "".join(READMES.values())))
    assert named <= known | launcher


def test_links_lead_somewhere():
    for path, text in READMES.items():
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (path.parent / target).exists(), f"{path}: {target}"


def test_the_python_example(capsys, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", READMES[REPOSITORY / "README.md"], flags=re.DOTALL)
    assert "./flan-t5-base-dialogsum-lora" in code
    shutil.copytree(REPOSITORY / "demo" / "model", tmp_path / "model")
    GenerationConfig(
        decoder_start_token_id=0, eos_token_id=1, pad_token_id=0, max_new_tokens=128, **DEFAULT_PROMPT._asdict()
    ).save_pretrained(tmp_path / "model")  # as in what is trained here
    exec(code.replace("./flan-t5-base-dialogsum-lora", str(tmp_path / "model")), {})
    assert capsys.readouterr().out == "#Person1#: May I borrow your ladder?\n"
