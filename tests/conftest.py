"""What the tests share: a two-layer Flan-T5, dialogues of unequal length, and the scripts run as users run them.

pytest's controller imports this too, and runs no tests, so torch is imported only where it is used.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if "TESTS_FOLDER" not in os.environ:  # pytest's workers are given it by the process that starts them
    TESTS_FOLDER = tempfile.TemporaryDirectory(dir="/tmp")  # short: a socket's path must fit into 100 characters
    os.environ |= {"TESTS_FOLDER": TESTS_FOLDER.name, "TESTS_PROCESS": str(os.getpid())}
# The libraries read these when they are imported: the tests leave the user's caches and the network alone.
os.environ |= {"HF_HOME": f"{os.environ['TESTS_FOLDER']}/huggingface", "HF_HUB_OFFLINE": "1"}
os.environ["PATH"] = (
    f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # accelerate, also of an inactive venv
)
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: more threads only get into each other's way
os.environ["LOCAL_SIZE"] = "1"  # or DeepSpeed on a CPU starts `numactl` for each gradient that it exchanges

import hypothesis
import pytest
import yaml
from filelock import FileLock

if TYPE_CHECKING:
    import torch

hypothesis.settings.register_profile("tests", deadline=None)  # an example may take long on a busy machine
hypothesis.settings.load_profile("tests")
REPOSITORY = Path(__file__).resolve().parent.parent
DIALOGSUM = REPOSITORY.parent / "shared" / "dialogsum"
WORDS = "the a to at on will can you I meet lend sell station park library Monday Friday guitar ladder tent".split()


def write_flan_t5(folder: Path, **shape: float) -> Path:
    """A model folder with random weights and, as Flan-T5's, an lm_head of its own and a config that says so."""
    import torch
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(REPOSITORY / "demo" / "model")
    torch.manual_seed(0)
    settings = dict(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, num_heads=4, d_ff=64, num_layers=2, dropout_rate=0.1,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0,
    )  # fmt: skip
    config = T5Config(**(settings | shape))
    model = T5ForConditionalGeneration(config)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight) * config.d_model**-0.5)
    model.config.tie_word_embeddings = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_rows(num_rows: int, seed: int = 0) -> list[dict[str, str]]:
    """Dialogues of 2 to 60 words with summaries of 1 to 25, so that no two micro-batches weigh the same."""
    rng = random.Random(seed)
    rows = []
    for index in range(num_rows):
        turns = [" ".join(rng.choices(WORDS, k=rng.randint(1, 30))) for _ in range(2)]
        dialogue = "\n".join(f"#Person{speaker}#: {turn}." for speaker, turn in enumerate(turns, start=1))
        summary = " ".join(rng.choices(WORDS, k=rng.randint(1, 25)))
        rows.append({"id": f"row_{index}", "dialogue": dialogue, "summary": summary})
    return rows


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


SLOW_FIXTURES = {"demo", "on_two", "open_page"}  # they start trainings or a browser


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One a core, and another while the slow tests wait for Slurm."""
    return min(os.cpu_count(), 8) + (config.option.markexpr != "not slow")


def pytest_collection_modifyitems(items: list[pytest.Item]):
    for item in items:
        if SLOW_FIXTURES.intersection(item.fixturenames):
            item.add_marker(pytest.mark.slow)
    # The longest first, lest one begin when all others are done; Slurm's all in one of pytest's workers, as another
    # would have to wait for its Slurm.
    first = ("test_slurm.py", "test_demo.py", "test_faults.py")
    items.sort(key=lambda item: first.index(item.path.name) if item.path.name in first else len(first))


def pytest_collection_finish():
    gc.freeze()  # what the libraries hold, so that no collection goes through it again


@pytest.fixture(scope="session")
def make_once(tmp_path_factory) -> Callable[[str, Callable[[Path], None]], Path]:
    """A function of a name and of a function that fills a folder: returns the folder of that name, filled once for all
    of pytest's workers. Tests must only read it."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def make_folder_once(name: str, fill: Callable[[Path], None]) -> Path:
        folder = shared / "made" / name
        folder.parent.mkdir(exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not Path(f"{folder}.done").exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                Path(f"{folder}.done").touch()
        return folder

    return make_folder_once


@pytest.fixture(scope="session")
def flan_t5(make_once) -> Path:
    return make_once("flan_t5", write_flan_t5)


@pytest.fixture(scope="session")
def data_files(make_once) -> dict[str, Path]:
    """Files of 40 train, 9 validation and 12 test rows; the test dialogues come three times."""

    def fill(folder: Path):
        write_rows(folder / "train.jsonl", make_rows(40))
        write_rows(folder / "validation.jsonl", make_rows(9, seed=1))
        test_rows = [
            {"id": f"test_{index}_{number}", "dialogue": row["dialogue"], "summary": f"{row['summary']} {number}"}
            for index, row in enumerate(make_rows(4, seed=2))
            for number in (1, 2, 3)
        ]
        write_rows(folder / "test.jsonl", test_rows)

    folder = make_once("data", fill)
    return {split: folder / f"{split}.jsonl" for split in ("train", "validation", "test")}


@pytest.fixture
def small_disk(tmp_path):
    """A function that makes a file system with room for so many KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def make(size: int) -> Path:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(folder)], capture_output=True, check=False
        )
        if mounted.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
        return folder

    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("only root can mount a tmpfs")
    yield make
    # Lazily: safetensors maps what it loads into memory for as long as a tensor lives.
    subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=False)


def relative_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """L2 norm of a - b over that of b, over all tensors together."""
    difference = sum((a[name] - b[name]).square().sum() for name in b)
    return float((difference / sum(tensor.square().sum() for tensor in b.values())).sqrt())


def usual_differences(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> tuple[float, float]:
    """The absolute difference that 99 % of all elements keep to, and the largest of those that 99 % of a tensor's do.
    AdamW divides a gradient by its size: where that is near 0, rounding alone decides whether a weight moves by a
    whole step, and one such weight can outweigh all others in relative_difference."""
    import torch

    differences = [(a[name] - b[name]).abs().flatten() for name in b]
    return float(torch.cat(differences).quantile(0.99)), max(float(one.quantile(0.99)) for one in differences)


def check_near(ours: dict[str, torch.Tensor], rounded: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    """Weights as near to the expected ones as those of the same training with its gradients rounded once more. Updates
    are to be steps of about 1e-3."""
    assert ours.keys() == expected.keys()
    differences, roundings = usual_differences(ours, expected), usual_differences(rounded, expected)
    assert 0 < roundings[0] < 1e-5 and differences[0] < 4 * roundings[0]
    assert 0 < roundings[1] < 1e-3 and differences[1] < 4 * roundings[1]


def run_script(*words: str | Path, num_processes: int = 1, timeout: int = 300, cold: bool = False, **environment: str):
    """Run a script and its arguments in a process of its own, or in several on gloo; returns the finished process.

    Args:
        cold: import the libraries anew instead of forking from a process that has (see warm.py).
    """
    words = words if cold else ("tests/warm.py", *words)
    if num_processes > 1:  # `accelerate launch --cpu --num_processes 2` runs one
        torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}")
        words = (*torchrun, *words) if cold else ("tests/warm.py", *torchrun, *words)
    if not cold and "WARM_SOCKET" not in environment:
        environment["WARM_SOCKET"] = start_warm_server()
    environment = {"ACCELERATE_USE_CPU": "true"} | environment
    return run_command(sys.executable, *words, timeout=timeout, **environment)


def start_script(*words: str | Path, cold: bool = False, **settings) -> subprocess.Popen:
    """Start a script and its arguments, with Popen's settings. Kill it with warm.KILL: its fork has then ended when
    wait() returns. `cold` as for run_script."""
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "WARM_SOCKET": start_warm_server()}
    command = [sys.executable, *([] if cold else ["tests/warm.py"]), *map(str, words)]
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, **({"stderr": subprocess.DEVNULL} | settings))


@functools.cache
def start_warm_server(**environment: str) -> str:
    """The socket of a warm.py server, which is started once for each environment, for all of pytest's workers, and
    ends with the process that started them.

    Args:
        environment: what the libraries read when they are imported.
    """
    name = hashlib.sha256(repr(sorted(environment.items())).encode()).hexdigest()[:16]
    path = Path(os.environ["TESTS_FOLDER"]) / name
    with FileLock(f"{path}.lock"):
        if not path.exists():
            server = subprocess.Popen(
                [sys.executable, "tests/warm.py", "serve", path, os.environ["TESTS_PROCESS"]], cwd=REPOSITORY,
                env=os.environ | {"DS_ACCELERATOR": "cpu"} | environment, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            assert "ready\n" in iter(server.stdout.readline, "")
    return str(path)


def warm_launch(script: Path, cold: bool = False, **environment: str) -> tuple[list[str], dict[str, str]]:
    """The words of `accelerate launch SCRIPT`, to be run in any folder, and what they need in the environment. Both
    fork from a process that has imported the libraries under this environment.

    Args:
        cold: the script imports them anew.
    """
    warm = str(REPOSITORY / "tests" / "warm.py")
    words = [sys.executable, warm, "-m", "accelerate.commands.accelerate_cli", "launch"]
    words += [str(script)] if cold else [warm, str(script)]
    return words, environment | {"WARM_SOCKET": start_warm_server(**environment)}


def run_command(*words: str | Path, timeout: int = 300, **environment: str):
    command = list(map(str, words))
    return subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | environment, capture_output=True, text=True, timeout=timeout
    )


def launch(strategy: str, *script: str | Path, lowered: bool = True, timeout: int = 300):
    """Start a script under a strategy, as users do: on two CPU processes, but for "one process".

    Args:
        lowered: with the libraries' thresholds so low that a tiny model meets them.
    """
    if strategy == "one process":
        return run_script(*script, timeout=timeout)
    if lowered:
        script = ("tests/lowered_thresholds.py", *script)
    if strategy == "ddp":
        return run_script(*script, num_processes=2, timeout=timeout)
    if strategy == "fsdp2":
        fsdp = yaml.safe_load((REPOSITORY / "accelerate_configs" / "fsdp2.yaml").read_text())["fsdp_config"]
        settings = {name.upper(): str(value) for name, value in fsdp.items()} | {"ACCELERATE_USE_FSDP": "true"}
        script = ("tests/fsdp_on_cpu.py", *script)  # accelerate launch would start it for a GPU
        return run_script(*script, num_processes=2, timeout=timeout, **settings)
    words = ("--config_file", f"accelerate_configs/{strategy}.yaml", "--num_processes", 2, "--main_process_port", 0)
    return accelerate_launch(*words, script=script, timeout=timeout, DS_ACCELERATOR="cpu")


def accelerate_launch(*words: str | Path, script: Sequence[str | Path], timeout: int = 300, **environment: str):
    """`accelerate launch WORDS SCRIPT`. The script cannot find the launcher's arguments, as it is not its child."""
    launcher = ("tests/warm.py", "-m", "accelerate.commands.accelerate_cli", "launch", *words)
    environment |= {"WARM_SOCKET": start_warm_server()}
    return run_command(sys.executable, *launcher, "tests/warm.py", *script, timeout=timeout, **environment)


def keep_checkpoint(finished: Path, output_dir: Path, step: int = 2) -> Path:
    """A folder as a kill after `step` updates leaves it."""
    name = f"checkpoints/step_{step:06d}"
    shutil.copytree(finished / name, output_dir / name)
    shutil.copy(finished / "metrics.jsonl", output_dir)
    return output_dir
