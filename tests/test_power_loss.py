"""What a command has left when it ends with 0 is on the disk: a copy of the disk, taken at that moment, holds it."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import run_script

pytestmark = pytest.mark.slow


@pytest.fixture
def disk(tmp_path):
    """A folder on an ext4 file system of its own, and a function that returns it as a power loss would leave it."""
    if os.geteuid() != 0 or not shutil.which("mkfs.ext4"):
        pytest.skip("only root can mount a file system, and mkfs.ext4 must be there")
    image, copy, mounted = tmp_path / "image", tmp_path / "copy", []

    def mount(file: Path) -> Path:
        folder = file.with_suffix(".mounted")
        folder.mkdir()
        subprocess.run(["mount", "-o", "loop", file, folder], capture_output=True, text=True, check=True)
        mounted.append(folder)
        return folder

    def lose_power() -> Path:
        shutil.copyfile(image, copy)
        return mount(copy)

    with image.open("wb") as file:
        file.truncate(64 * 2**20)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    try:
        folder = mount(image)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no file can be mounted here: {error.stderr.strip()}")
    yield folder, lose_power
    for folder in mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


def check_nothing_is_lost(folder: Path, lose_power: Callable[[], Path]):
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    copy = lose_power()
    assert len(files) > 3
    lost = [name for name in files if not (copy / name).exists()]
    changed = [
        name for name, path in files.items() if name not in lost and (copy / name).read_bytes() != path.read_bytes()
    ]
    assert (lost, changed) == ([], [])


@pytest.mark.parametrize("overwrites", [False, True])
def test_a_training_and_its_merge(disk, flan_t5, data_files, overwrites):
    folder, lose_power = disk
    words = (
        "train_lora.py", "--model_name_or_path", flan_t5, "--train_file", data_files["train"], "--validation_file",
        data_files["validation"], "--max_train_steps", 2, "--checkpointing_steps", 1, "--eval_steps", 1,
        "--output_dir", folder / "out", "--merge_into", folder / "merged", "--overwrite_output_dir", "true",
    )  # fmt: skip
    for seed in range(1 + overwrites):
        run = run_script(*words, "--seed", seed)
        assert run.returncode == 0, run.stderr
        if overwrites and seed == 0:
            os.sync()
    check_nothing_is_lost(folder, lose_power)


def test_an_evaluation(disk, flan_t5, data_files):
    folder, lose_power = disk
    run = run_script(
        "evaluate_rouge.py", "--models", f"model={flan_t5}", "--test_file", data_files["test"], "--max_new_tokens", 4,
        "--output_dir", folder / "report",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    check_nothing_is_lost(folder, lose_power)
