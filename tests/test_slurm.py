"""The sbatch files on a real Slurm of two nodes on this machine."""

import os
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY, read_jsonl

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/etc/debian_version").exists(), reason="a local Slurm needs root on Debian"
)


def find_free_ports(num_ports: int) -> int:
    """The first of `num_ports` neighbouring ports that are free now."""
    for port in range(21000, 30000, 10):
        try:
            for offset in range(num_ports):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port + offset))
        except OSError:
            continue
        return port
    raise RuntimeError("no free ports")


@pytest.fixture(scope="module")
def slurm():
    """The environment of a running cluster."""
    folder = tempfile.mkdtemp(dir="/tmp")  # short: the path of a Unix socket must fit into 100 characters
    start = [REPOSITORY / "tests" / "slurm" / "start-local-slurm.sh", folder]
    environment = os.environ | {"LS_PORT": str(find_free_ports(3)), "LS_GPUS": "1"}
    output = subprocess.run(start, env=environment, check=True, capture_output=True, text=True, timeout=240).stdout
    name, _, value = shlex.split(output)[1].partition("=")
    yield os.environ | {name: value, "ACCELERATE_USE_CPU": "true"}
    subprocess.run([REPOSITORY / "tests" / "slurm" / "stop-local-slurm.sh", folder], check=True, timeout=120)
    shutil.rmtree(folder)


def run_job(slurm: dict[str, str], log: Path, *words: str, timeout: int = 240) -> str:
    """Submit, wait until the job is over, and return its state."""
    submit = ["sbatch", "--parsable", "--time=10", "--cpus-per-task=1", f"--output={log}", *words]
    run = subprocess.run(submit, cwd=REPOSITORY, env=slurm, check=True, capture_output=True, text=True, timeout=60)
    job = run.stdout.strip()
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        show = ["scontrol", "--oneliner", "show", "job", job]
        fields = subprocess.run(show, env=slurm, check=True, capture_output=True, text=True, timeout=60).stdout
        state = dict(field.partition("=")[::2] for field in fields.split())["JobState"]
        if state not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
            return state
        time.sleep(1)
    subprocess.run(["scancel", job], env=slurm, check=True, timeout=60)
    raise TimeoutError(f"job {job} was {state} after {timeout} s: {log.read_text()}")


def test_two_nodes_train_together(slurm, flan_t5, data_files, tmp_path):
    settings = (
        "--model_name_or_path", flan_t5, "--train_file", data_files["train"], "--output_dir", tmp_path / "lora",
        "--total_train_batch_size", "8", "--logging_steps", "1",
    )  # fmt: skip
    words = ["--nodes", "2", "--gpus-per-node", "1", "slurm/train_lora.sbatch", *map(str, settings)]
    assert run_job(slurm, tmp_path / "log", *words) == "COMPLETED", (tmp_path / "log").read_text()
    assert '"num_processes": 2' in (tmp_path / "lora" / "run_manifest.json").read_text()
    assert [line["step"] for line in read_jsonl(tmp_path / "lora" / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert (tmp_path / "lora" / "adapter_model.safetensors").exists()


def test_a_failing_script_fails_the_job(slurm, tmp_path):
    words = ["slurm/train_full.sbatch", "--train_file", "missing.csv"]
    assert run_job(slurm, tmp_path / "log", *words) == "FAILED"
    assert "missing.csv: no such file" in (tmp_path / "log").read_text()
