"""A run that is stopped, killed or short of disk loses nothing, and resumes to bit-identical weights.

Most trainings run in this process: 12 updates of 8 examples, logged every 3, validated every 4, a checkpoint every 5,
so that a checkpoint's interval is open. `tests/test_checkpointing.py ORDERS` is what torch.distributed.run starts.
"""

import ast
import contextlib
import dataclasses
import errno
import gc
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import (
    REPOSITORY,
    make_rows,
    read_jsonl,
    relative_difference,
    run_script,
    start_script,
    write_flan_t5,
    write_rows,
)  # fmt: skip
from helpers import read_record
from safetensors import SafetensorError
from safetensors.torch import load_file

import train_full
import train_lora
from utils.config import LoraTrainingConfig, TrainingConfig, UserError
from utils.data import prefetch
from utils.launch import stopping
from utils.launch.output_dir import find_checkpoints, step_of
from utils.launch.processes import leave_process_group
from utils.launch.stopping import EXIT_STOPPED, StopRequest
from utils.training import checkpoint_files, loop, tracking
from utils.training.checkpoint_files import CheckpointError, choose_checkpoint, verify_checkpoint

SCRIPTS = {"full": (train_full, TrainingConfig), "lora": (train_lora, LoraTrainingConfig)}
WEIGHTS = {"full": "model.safetensors", "lora": "adapter_model.safetensors"}
FILES = ["manifest.json", "metrics.jsonl", "model.safetensors", "optimizer.safetensors", "state.json"]
SETTINGS = {
    "total_train_batch_size": 8, "per_device_train_batch_size": 4, "max_train_steps": 12, "logging_steps": 3,
    "eval_steps": 4, "checkpointing_steps": 5, "mixed_precision": "no", "learning_rate": 1e-2,
}  # fmt: skip
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def as_before(caplog):
    """The handlers that a run sets are not left to the tests after it."""
    caplog.set_level("INFO", logger="utils")
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def paths(flan_t5, data_files) -> dict[str, str]:
    return {
        "model_name_or_path": str(flan_t5),
        "train_file": str(data_files["train"]),
        "validation_file": str(data_files["validation"]),
    }


def train(kind: str, paths: dict[str, str], output_dir: Path, **settings) -> int:
    """The script's exit code."""
    script, config_class = SCRIPTS[kind]
    gc.collect()  # of a run that ended with an error, whose lock is held by the error's traceback
    AcceleratorState._reset_state(True)
    try:
        script.main(config_class(output_dir=str(output_dir), **(SETTINGS | paths | settings)))
    except SystemExit as stop:
        return stop.code
    return 0


def resume(kind: str, paths: dict[str, str], output_dir: Path, **settings) -> int:
    return train(kind, paths, output_dir, resume_from_checkpoint="latest", **settings)


@contextlib.contextmanager
def acting_in_step(step: int, action):
    """Call `action` while `step` is being computed."""
    select_examples = prefetch.select_examples

    def select_and_act(num_examples, total, seed, index):
        if index == step - 1:
            action()
        return select_examples(num_examples, total, seed, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefetch, "select_examples", select_and_act)
        yield


def stop_in_step(step: int, kind: str, paths: dict[str, str], output_dir: Path, **settings) -> int:
    with acting_in_step(step, (output_dir / "STOP").touch):
        return train(kind, paths, output_dir, **settings)


def check_same(kind: str, output_dir: Path, never_stopped: Path):
    ours, theirs = (load_file(path / WEIGHTS[kind]) for path in (output_dir, never_stopped))
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not ours[name].equal(theirs[name])] == []
    assert read_record(output_dir) == read_record(never_stopped)


@pytest.fixture(scope="session")
def never_stopped(paths, make_once) -> dict[str, Path]:
    def fill(folder: Path):
        for kind in SCRIPTS:
            assert train(kind, paths, folder / kind) == 0
            steps = [(line["step"], line["split"]) for line in read_jsonl(folder / kind / "metrics.jsonl")]
            expected = [(step, "train") for step in (3, 6, 9, 12)] + [(step, "validation") for step in (0, 4, 8, 12)]
            assert sorted(steps) == sorted(expected)

    folder = make_once("never_stopped", fill)
    return {kind: folder / kind for kind in SCRIPTS}


@pytest.fixture(scope="session")
def stopped(paths, tmp_path_factory) -> dict[str, Path]:
    """Runs stopped in step 8, with checkpoints of 5 and 8. Not to be written to, though runs that are refused lock
    them."""
    folders = {kind: tmp_path_factory.mktemp("stopped") / kind for kind in SCRIPTS}
    for kind, folder in folders.items():
        assert stop_in_step(8, kind, paths, folder) == EXIT_STOPPED
        assert [path.name for path in find_checkpoints(folder)] == ["step_000008", "step_000005"]
    return folders


@pytest.fixture
def copy_of_stopped(stopped, tmp_path) -> Path:
    return shutil.copytree(stopped["full"], tmp_path / "out")


# --- exact ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", SCRIPTS)
def test_stopped_by_a_file(paths, stopped, never_stopped, tmp_path, kind):
    output_dir = shutil.copytree(stopped[kind], tmp_path / "out")
    assert not (output_dir / "STOP").exists()  # or it would stop at once when resumed
    state = verify_checkpoint(output_dir / "checkpoints" / "step_000008")
    assert state["interval"]["num_examples"] == 16  # steps 7 and 8 have not been logged
    assert resume(kind, paths, output_dir) == 0
    check_same(kind, output_dir, never_stopped[kind])


@pytest.mark.slow
@pytest.mark.parametrize("kind", SCRIPTS)
def test_stopped_more_than_once(paths, never_stopped, tmp_path, kind):
    """By each signal in turn; before the first checkpoint, at a logged step, at a validated one and at the last."""
    for step, number in zip((2, 6, 8, 12), (*SIGNALS, signal.SIGTERM), strict=True):
        with acting_in_step(step, lambda number=number: os.kill(os.getpid(), number)):
            assert resume(kind, paths, tmp_path / "out") == EXIT_STOPPED
        assert find_checkpoints(tmp_path / "out")[0].name == f"step_{step:06d}"
    assert resume(kind, paths, tmp_path / "out") == 0
    check_same(kind, tmp_path / "out", never_stopped[kind])


@pytest.mark.slow
def test_stopped_by_time(paths, never_stopped, tmp_path):
    with acting_in_step(7, lambda: time.sleep(60)), pytest.MonkeyPatch.context() as patch:
        now = [0.0]
        patch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
        patch.setattr(stopping.time, "monotonic", lambda: now[0])
        assert train("full", paths, tmp_path / "out", max_time="00:01:01") == 0
        shutil.rmtree(tmp_path / "out")
        assert train("full", paths, tmp_path / "out", max_time="00:00:59") == EXIT_STOPPED
    assert resume("full", paths, tmp_path / "out") == 0
    check_same("full", tmp_path / "out", never_stopped["full"])


@pytest.mark.slow
def test_a_validation_is_left_early(paths, never_stopped, tmp_path):
    evaluate_loss = loop.evaluate_loss

    def ask_and_evaluate(accelerator, model, data, config, stop):
        if (tmp_path / "out" / "checkpoints" / "best_step_000004").exists():
            stop.file.touch()
        return evaluate_loss(accelerator, model, data, config, stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "evaluate_loss", ask_and_evaluate)
        assert train("full", paths, tmp_path / "out") == EXIT_STOPPED
    assert find_checkpoints(tmp_path / "out")[0].name == "step_000008"
    assert read_record(tmp_path / "out")[-1][:2] == (6, "train")
    assert resume("full", paths, tmp_path / "out") == 0
    check_same("full", tmp_path / "out", never_stopped["full"])


def to_words(settings: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


@contextlib.contextmanager
def started(words: list, output_dir: Path, cold: bool = False):
    """A process of its own, with its first train line already written; killed if it does not end by itself."""
    with (output_dir.parent / f"{output_dir.name}.log").open("w+") as log:
        process = start_script(*words, cold=cold, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + 120
            while not any(split == "train" for _, split, *_ in read_if_there(output_dir)):
                assert process.poll() is None and time.monotonic() < deadline, Path(log.name).read_text()
                time.sleep(0.005)
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def read_if_there(output_dir: Path) -> list[tuple]:
    try:
        return read_record(output_dir)
    except (FileNotFoundError, json.JSONDecodeError):  # a line half written
        return []


LONG = {"max_train_steps": 40, "logging_steps": 7, "eval_steps": 25, "checkpointing_steps": 10, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def long_never_stopped(paths, make_once) -> dict[str, Path]:
    def fill(folder: Path):
        for kind in SCRIPTS:
            assert train(kind, paths, folder / kind, **LONG) == 0

    folder = make_once("long_never_stopped", fill)
    return {kind: folder / kind for kind in SCRIPTS}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "number"), [("full", signal.SIGTERM), ("lora", signal.SIGINT), ("full", signal.SIGUSR1)]
)
def test_a_signal_to_a_process(paths, long_never_stopped, tmp_path, kind, number):
    output_dir = tmp_path / "out"
    words = [f"train_{kind}.py", *to_words(SETTINGS | paths | LONG), f"--output_dir={output_dir}"]
    # One of them cold: a process that was not forked.
    with started(words, output_dir, cold=number == signal.SIGUSR1) as process:
        process.send_signal(number)
        assert process.wait(60) == EXIT_STOPPED
    step = verify_checkpoint(find_checkpoints(output_dir)[0])["step"]
    log = (tmp_path / "out.log").read_text()
    assert f"stopped after step {step}; resume with --resume_from_checkpoint latest" in log
    assert step < LONG["max_train_steps"] and "Traceback" not in log
    assert resume(kind, paths, output_dir, **LONG) == 0
    check_same(kind, output_dir, long_never_stopped[kind])


@pytest.mark.slow
def test_a_signal_while_it_is_loading(paths, tmp_path):
    """Held back until the script listens, as slurm/launch.sh does."""
    settings = SETTINGS | paths | {"output_dir": tmp_path / "out"}
    del settings["validation_file"]  # else it stops in the first evaluation, with nothing to save
    words = [sys.executable, "train_lora.py", *to_words(settings)]
    process = subprocess.Popen(
        words, cwd=REPOSITORY, env=os.environ | {"ACCELERATE_USE_CPU": "true"},
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1]),
    )  # fmt: skip
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == EXIT_STOPPED
    assert verify_checkpoint(find_checkpoints(tmp_path / "out")[0])["step"] == 1


@pytest.mark.slow
def test_a_signal_on_the_way_out(paths, tmp_path):
    """The work is done: the exit code says so."""
    script = (
        "import atexit, os, signal, train_full; from utils.launch.script import run_script;"
        "from utils.config import TrainingConfig;"
        "atexit.register(lambda: os.write(1, signal.getsignal(signal.SIGUSR1).name.encode()));"
        "run_script(train_full.main, TrainingConfig, 'train_full.yaml')"
    )
    words = [sys.executable, "-c", script, *to_words(SETTINGS | paths), f"--output_dir={tmp_path / 'out'}"]
    run = subprocess.run(words, cwd=REPOSITORY, env=os.environ | {"ACCELERATE_USE_CPU": "true"}, capture_output=True)
    assert (run.returncode, run.stdout) == (0, b"SIG_IGN"), run.stderr.decode()


def test_a_second_interrupt_ends_it_at_once(tmp_path, monkeypatch):
    killed = []
    monkeypatch.setattr(os, "kill", lambda process, number: killed.append((process, number)))
    now = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    stop = StopRequest(None, TrainingConfig(output_dir=str(tmp_path)))
    stop.take_signal(signal.SIGINT, None)
    now[0] += 0.5
    stop.take_signal(signal.SIGINT, None)  # the launcher passes on what the terminal has sent already
    assert stop.signaled and not killed
    now[0] += 0.6
    stop.take_signal(signal.SIGINT, None)
    assert killed == [(os.getpid(), signal.SIGINT)]
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL


# --- several processes ---------------------------------------------------------------------------------------------


def take_orders(path: str):
    """In each process of torch.distributed.run: trainings one after the other, so that imports are waited for once."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("utils").setLevel(logging.INFO if os.environ["RANK"] == "0" else logging.WARNING)
    for kind, stop_step, settings, code in json.loads(Path(path).read_text()):
        output_dir, paths = Path(settings.pop("output_dir")), settings.pop("paths")
        with acting_in_step(stop_step, (output_dir / "STOP").touch):
            assert train(kind, paths, output_dir, **settings) == code
    leave_process_group()


@pytest.fixture(scope="module")
def without_dropout(paths, tmp_path_factory) -> dict[str, str]:
    model = write_flan_t5(tmp_path_factory.mktemp("without_dropout") / "model", dropout_rate=0.0)
    # In fours, so that two processes add them up in another order than one.
    return paths | {"model_name_or_path": str(model), "per_device_train_batch_size": 2}


@pytest.fixture(scope="module")
def on_two(paths, without_dropout, tmp_path_factory) -> tuple[Path, str]:
    """Folders of trainings on two processes, and their log."""
    folder = tmp_path_factory.mktemp("two")
    assert stop_in_step(8, "full", without_dropout, folder / "from_one") == EXIT_STOPPED
    going_on = {"resume_from_checkpoint": "latest"}
    orders = []
    for kind in SCRIPTS:
        # An interval of eleven updates, whose losses are summed on each process before they are summed over them.
        settings = {"paths": paths, "output_dir": str(folder / f"stopped_{kind}"), "logging_steps": 11}
        orders.append([kind, 0, settings | {"output_dir": str(folder / f"never_{kind}")}, 0])
        orders += [[kind, 8, settings, EXIT_STOPPED], [kind, 0, settings | going_on, 0]]
    of_one = {"paths": without_dropout, "output_dir": str(folder / "from_one")}
    orders.append(["full", 0, of_one | going_on, 0])
    orders.append(["full", 8, of_one | {"output_dir": str(folder / "from_two")}, EXIT_STOPPED])
    (folder / "orders.json").write_text(json.dumps(orders))
    run = run_script("tests/test_checkpointing.py", folder / "orders.json", num_processes=2, timeout=200)
    assert run.returncode == 0, run.stderr
    return folder, run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", SCRIPTS)
def test_exact_on_two_processes(on_two, kind):
    folder, _ = on_two
    state = verify_checkpoint(folder / f"stopped_{kind}" / "checkpoints" / "step_000008")
    assert (state["num_processes"], state["interval"]["num_examples"]) == (2, 64)
    check_same(kind, folder / f"stopped_{kind}", folder / f"never_{kind}")


@pytest.fixture(scope="module")
def never_stopped_on_one(without_dropout, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one") / "out"
    assert train("full", without_dropout, folder) == 0
    return folder


def check_same_to_rounding(model: str, output_dir: Path, never_stopped: Path):
    before = load_file(f"{model}/model.safetensors")
    ends = [load_file(folder / "model.safetensors") for folder in (output_dir, never_stopped)]
    moved, expected = ({name: end[name] - before[name] for name in before} for end in ends)
    # As in test_same_training.py: AdamW divides a gradient by its size, so the rounding of one near 0 shows.
    assert 0 < relative_difference(moved, expected) < 5e-5
    ours, theirs = read_record(output_dir), read_record(never_stopped)
    assert [line[:2] for line in ours] == [line[:2] for line in theirs]
    assert [line[2] for line in ours] == pytest.approx([line[2] for line in theirs], rel=1e-5)


def test_from_one_process_to_two(on_two, without_dropout, never_stopped_on_one):
    folder, log = on_two
    assert "it was written with num_processes 1, here it is 2: the same training to rounding, not to the bit" in log
    check_same_to_rounding(without_dropout["model_name_or_path"], folder / "from_one", never_stopped_on_one)


def test_from_two_processes_to_one(on_two, without_dropout, never_stopped_on_one, caplog):
    output_dir = on_two[0] / "from_two"
    assert resume("full", without_dropout, output_dir) == 0
    assert (
        "it was written with num_processes 2, here it is 1: the same training to rounding, not to the bit"
        in caplog.text
    )
    check_same_to_rounding(without_dropout["model_name_or_path"], output_dir, never_stopped_on_one)


@pytest.mark.slow
def test_a_signal_to_the_launcher(paths, tmp_path):
    output_dir = tmp_path / "out"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = ["tests/warm.py", "train_lora.py", *to_words(SETTINGS | paths | LONG), f"--output_dir={output_dir}"]
    with started([*launcher, *script], output_dir) as process:
        process.terminate()
        process.wait(60)
    step = verify_checkpoint(find_checkpoints(output_dir)[0])["step"]
    assert (
        step < LONG["max_train_steps"]
        and f"stopped after step {step}; resume with" in (tmp_path / "out.log").read_text()
    )


# --- damage --------------------------------------------------------------------------------------------------------


def damage(path: Path, how: str):
    content = path.read_bytes()
    if how == "removed":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "emptied":
        path.write_bytes(b"")
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


def config_of(output_dir: Path, resume_from_checkpoint: str | Path = "latest") -> TrainingConfig:
    return TrainingConfig(output_dir=str(output_dir), resume_from_checkpoint=str(resume_from_checkpoint))


def run_of(output_dir: Path) -> dict:
    return json.loads((output_dir / "checkpoints" / "step_000005" / "state.json").read_text())["run"]


@pytest.mark.parametrize("how", ["truncated", "emptied", "one bit flipped", "removed"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint(copy_of_stopped, caplog, name, how):
    newest, before = find_checkpoints(copy_of_stopped)
    assert sorted(path.name for path in newest.iterdir()) == FILES
    assert choose_checkpoint(config_of(copy_of_stopped), run_of(copy_of_stopped))[0] == newest
    damage(newest / name, how)
    folder, state = choose_checkpoint(config_of(copy_of_stopped), run_of(copy_of_stopped))
    assert (folder, state["step"]) == (before, 5)
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith(f"{newest}: {name} ") and warning.endswith(": resuming from step_000005")
    with pytest.raises(UserError, match=f"--resume_from_checkpoint {newest}: {newest}: {name} "):
        choose_checkpoint(config_of(copy_of_stopped, newest), run_of(copy_of_stopped))


def test_every_bit_of_the_manifest_counts(copy_of_stopped):
    path = find_checkpoints(copy_of_stopped)[0] / "manifest.json"
    content = path.read_bytes()
    for position in range(len(content)):
        for bit in range(8):
            changed = bytearray(content)
            changed[position] ^= 1 << bit
            path.write_bytes(changed)
            with pytest.raises(CheckpointError):
                verify_checkpoint(path.parent)


def test_going_on_from_the_one_before(paths, copy_of_stopped, never_stopped):
    damage(copy_of_stopped / "checkpoints" / "step_000008" / "optimizer.safetensors", "one bit flipped")
    assert resume("full", paths, copy_of_stopped) == 0
    check_same("full", copy_of_stopped, never_stopped["full"])
    verify_checkpoint(find_checkpoints(copy_of_stopped)[0])


def test_going_on_from_a_named_one(paths, copy_of_stopped, never_stopped):
    named = str(copy_of_stopped / "checkpoints" / "step_000005")
    assert train("full", paths, copy_of_stopped, resume_from_checkpoint=named) == 0
    check_same("full", copy_of_stopped, never_stopped["full"])


def test_no_good_checkpoint_is_no_beginning(paths, copy_of_stopped):
    for folder in find_checkpoints(copy_of_stopped):
        damage(folder / "model.safetensors", "truncated")
    record = read_record(copy_of_stopped)
    with pytest.raises(UserError, match="step_000008: model.safetensors has .*step_000005: model.safetensors has "):
        resume("full", paths, copy_of_stopped)
    assert read_record(copy_of_stopped) == record


@pytest.mark.slow
def test_a_refusal_is_one_line_and_code_2(paths, copy_of_stopped):
    newest = find_checkpoints(copy_of_stopped)[0]
    damage(newest / "state.json", "one bit flipped")
    words = [*to_words(SETTINGS | paths), f"--output_dir={copy_of_stopped}", f"--resume_from_checkpoint={newest}"]
    run = run_script("train_full.py", *words)
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith(f"train_full.py: error: --resume_from_checkpoint {newest}: ")
    assert "Traceback" not in run.stderr


# --- another run's -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", 7), ("total_train_batch_size", 10), ("learning_rate", 0.02), ("warmup_ratio", 0.5),
     ("mixed_precision", "bf16"), ("max_source_length", 64)],
)  # fmt: skip
def test_another_setting(paths, stopped, name, value):
    was = TrainingConfig(**SETTINGS).__getattribute__(name)
    with pytest.raises(UserError, match=f"step_000008: it is of another run: {name} was {was} and is {value}$"):
        resume("full", paths, stopped["full"], **{name: value})


def test_other_settings_are_all_named(paths, stopped):
    with pytest.raises(UserError, match="seed was 42 and is 7; learning_rate was 0.01 and is 0.02$"):
        resume("full", paths, stopped["full"], seed=7, learning_rate=0.02)


def test_a_new_setting_counts(paths, stopped, monkeypatch):
    """A script that gets a new setting need not say so anywhere else."""
    mine = dataclasses.make_dataclass("Mine", [("label_smoothing", float, 0.0)], bases=(TrainingConfig,), frozen=True)
    monkeypatch.setitem(SCRIPTS, "full", (train_full, mine))
    with pytest.raises(UserError, match="label_smoothing was None and is 0.1$"):
        resume("full", paths, stopped["full"], label_smoothing=0.1)


def test_another_prompt(paths, stopped):
    with pytest.raises(UserError, match="(?s)source_suffix was .*Summary: and is .*TL;DR:$"):
        resume("full", paths, stopped["full"], source_suffix="\nTL;DR:")


def test_another_number_of_steps(paths, stopped):
    reason = "the linear schedule depends on it, constant does not"
    with pytest.raises(UserError, match=f"num_train_steps was 12 and is 13; {reason}$"):
        resume("full", paths, stopped["full"], max_train_steps=13)


def test_more_steps_where_the_schedule_allows_it(paths, tmp_path):
    """Even of a run that has finished; the weights are those of a run that was as long from the start."""
    settings = {"lr_scheduler_type": "constant"}
    assert train("full", paths, tmp_path / "whole", max_train_steps=9, **settings) == 0
    assert train("full", paths, tmp_path / "longer", max_train_steps=5, **settings) == 0
    assert resume("full", paths, tmp_path / "longer", max_train_steps=9, **settings) == 0
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("longer", "whole"))
    assert all(tensor.equal(ours[name]) for name, tensor in theirs.items())
    with pytest.raises(UserError, match="num_train_steps was 9 and is 4$"):
        resume("full", paths, tmp_path / "longer", max_train_steps=4, **settings)


def test_another_rank(paths, stopped):
    with pytest.raises(UserError, match="lora_r was 32 and is 8;"):
        resume("lora", paths, stopped["lora"], lora_r=8)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_other_data(paths, stopped, tmp_path, split):
    rows = make_rows(40, seed=3) if split == "train" else make_rows(9, seed=3)
    other = {f"{split}_file": str(write_rows(tmp_path / "other.jsonl", rows))}
    was = run_of(stopped["full"])["data_fingerprint"]
    with pytest.raises(UserError, match=f"data_fingerprint was {was} and is (?!{was})[0-9a-f]{{64}}$"):
        resume("full", paths | other, stopped["full"])


@pytest.mark.parametrize("kind", SCRIPTS)
def test_another_model(paths, stopped, tmp_path, kind):
    """One weight differs, by its last bit."""
    model = Path(shutil.copytree(paths["model_name_or_path"], tmp_path / "model"))
    changed = bytearray((model / "model.safetensors").read_bytes())
    changed[-4] ^= 1
    (model / "model.safetensors").write_bytes(changed)
    was = run_of(stopped[kind])["model_fingerprint"]
    with pytest.raises(UserError, match=f"model_fingerprint was {was} and is (?!{was})[0-9a-f]{{16}}$"):
        resume(kind, paths | {"model_name_or_path": str(model)}, stopped[kind])


def test_the_other_script(paths, stopped):
    with pytest.raises(UserError, match="lora_r was None and is 32;"):
        resume("lora", paths, stopped["full"])


# --- what to start from --------------------------------------------------------------------------------------------


def test_checkpoints_and_neither_flag(paths, stopped):
    record = read_record(stopped["full"])
    with pytest.raises(UserError) as error:
        train("full", paths, stopped["full"])
    assert str(stopped["full"]) in str(error.value)
    assert "--resume_from_checkpoint latest" in str(error.value) and "--overwrite_output_dir" in str(error.value)
    assert read_record(stopped["full"]) == record and len(find_checkpoints(stopped["full"])) == 2


def test_latest_without_a_checkpoint(paths, never_stopped, tmp_path, caplog):
    assert resume("full", paths, tmp_path / "out") == 0
    assert f"no checkpoint in {tmp_path / 'out'} yet: the run begins from its start" in caplog.text
    check_same("full", tmp_path / "out", never_stopped["full"])


@pytest.mark.slow
def test_two_runs_at_once(paths, tmp_path):
    """The second is refused whatever it asks for, and leaves the first alone; when that has ended, it is not."""
    words = ["train_full.py", *to_words(SETTINGS | paths | {"output_dir": tmp_path / "out"})]

    def start_another():
        for more in (["--resume_from_checkpoint=latest"], ["--overwrite_output_dir"]):
            run = run_script(*words, *more)
            text = f"--output_dir {tmp_path / 'out'}: another run writes to it; wait for its end, or take another"
            assert run.returncode == 2 and run.stderr.splitlines()[-1] == f"train_full.py: error: {text}"

    with acting_in_step(7, start_another):
        assert train("full", paths, tmp_path / "out") == 0
    run = run_script(*words, "--resume_from_checkpoint=latest")
    assert run.returncode == 0, run.stderr


def test_others_may_read_what_is_written(never_stopped):
    for folder in never_stopped.values():
        modes = {path: path.stat().st_mode for path in folder.rglob("*") if path.is_file()}
        assert set(modes.values()) == {modes[folder / "metrics.jsonl"]}


def test_overwriting_starts_over(paths, copy_of_stopped, never_stopped):
    assert train("full", paths, copy_of_stopped, overwrite_output_dir=True) == 0
    check_same("full", copy_of_stopped, never_stopped["full"])
    assert [path.name for path in find_checkpoints(copy_of_stopped)] == ["step_000012", "step_000010", "step_000005"]


def test_a_folder_that_is_not_there(paths, stopped, tmp_path):
    named = str(stopped["full"] / "checkpoints" / "step_000007")
    with pytest.raises(UserError, match=f"--resume_from_checkpoint {named}: no such folder"):
        train("full", paths, stopped["full"], resume_from_checkpoint=named)


@pytest.mark.parametrize("finished", [True, False])
def test_an_unfinished_folder(paths, stopped, never_stopped, tmp_path, finished):
    """What a kill in the writer leaves: gone with the next start, and never chosen, be it as good as done."""
    output_dir = Path(shutil.copytree(stopped["full"], tmp_path / "out"))
    unfinished = output_dir / "checkpoints" / "step_000011.unfinished"
    shutil.copytree(output_dir / "checkpoints" / "step_000005", unfinished)
    if not finished:
        for folder in find_checkpoints(output_dir):
            shutil.rmtree(folder)
    seen = []
    with acting_in_step(9 if finished else 1, lambda: seen.append(unfinished.exists())):
        assert resume("full", paths, output_dir) == 0
    assert seen == [False]
    check_same("full", output_dir, never_stopped["full"])


# --- which are kept ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2])
def test_rotation(paths, tmp_path, monkeypatch, limit):
    remove_checkpoint, kept = checkpoint_files.remove_checkpoint, []

    def look_and_remove(folder):
        kept.append([path.name for path in find_checkpoints(tmp_path / "out")])
        assert verify_checkpoint(find_checkpoints(tmp_path / "out")[0])["step"] > step_of(folder)
        remove_checkpoint(folder)

    monkeypatch.setattr(checkpoint_files, "remove_checkpoint", look_and_remove)
    settings = {"checkpoints_total_limit": limit, "checkpointing_steps": 2, "eval_steps": 100}
    assert train("full", paths, tmp_path / "out", **settings) == 0
    steps = [f"step_{step:06d}" for step in (12, 10, 8, 6, 4, 2)]
    assert [path.name for path in find_checkpoints(tmp_path / "out")] == steps[:limit]
    assert all(len(names) == limit + 1 for names in kept) and len(kept) == 6 - limit


def test_a_kill_before_the_last_rotation(paths, copy_of_stopped, never_stopped):
    """The old ones are removed when the run is resumed, even if nothing is left to write."""
    shutil.copytree(never_stopped["full"] / "checkpoints", copy_of_stopped / "checkpoints", dirs_exist_ok=True)
    assert len(find_checkpoints(copy_of_stopped)) == 4
    assert resume("full", paths, copy_of_stopped, checkpoints_total_limit=1) == 0
    assert [path.name for path in find_checkpoints(copy_of_stopped)] == ["step_000012"]
    check_same("full", copy_of_stopped, never_stopped["full"])


def test_the_only_good_one_is_kept(paths, tmp_path, monkeypatch):
    """With a limit of 1, and no later one that can be written."""
    save_file = checkpoint_files.save_file

    def fail_after_the_first(tensors, path):
        if "step_000002" not in str(path):
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint_files, "save_file", fail_after_the_first)
    assert train("full", paths, tmp_path / "out", checkpoints_total_limit=1, checkpointing_steps=2) == 0
    assert os.listdir(tmp_path / "out" / "checkpoints") == ["step_000002"]
    verify_checkpoint(find_checkpoints(tmp_path / "out")[0])


@pytest.mark.slow
@pytest.mark.parametrize("stop_step", [None, 6, 10])
@pytest.mark.parametrize("kind", SCRIPTS)
def test_the_best_is_exported(paths, tmp_path, monkeypatch, kind, stop_step):
    """Validation losses of 5, 3, 4, 3.5 by decree; the weights of the second are exported, also by a resumed run."""
    losses, seen = {2: 5.0, 4: 3.0, 8: 4.0, 12: 3.5}, {}

    def evaluate_loss(accelerator, model, data, config, stop):
        step = len(seen)
        seen[step] = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        return {"loss": [6.0, *losses.values()][step], "num_examples": 9, "num_target_tokens": 100}

    monkeypatch.setattr(loop, "evaluate_loss", evaluate_loss)
    monkeypatch.setattr(loop, "validate", skip_all_but(losses, loop.validate))
    settings = {"eval_steps": 2, "load_best_model_at_end": True}
    if stop_step:
        assert stop_in_step(stop_step, kind, paths, tmp_path / "out", **settings) == EXIT_STOPPED
        assert resume(kind, paths, tmp_path / "out", **settings) == 0
    else:
        assert train(kind, paths, tmp_path / "out", **settings) == 0
    assert [path.name for path in find_checkpoints(tmp_path / "out", "best_step")] == ["best_step_000004"]
    exported = load_file(tmp_path / "out" / WEIGHTS[kind])
    assert len(exported) > 4
    # PEFT leaves out its adapter's name.
    best = {name.replace(".default", ""): tensor for name, tensor in seen[2].items()}
    assert [name for name in exported if not exported[name].equal(best[name])] == []
    last = {name.replace(".default", ""): tensor for name, tensor in seen[4].items()}
    assert not all(exported[name].equal(last[name]) for name in exported)


def test_a_best_that_cannot_be_written(paths, tmp_path, monkeypatch, caplog):
    """The best one that is there is exported, instead of none."""
    save_file, losses = checkpoint_files.save_file, {4: 5.0, 8: 4.0, 12: 6.0}

    def fail_at_eight(tensors, path):
        if "best_step_000008" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path)

    values = iter([6.0, *losses.values()])
    monkeypatch.setattr(checkpoint_files, "save_file", fail_at_eight)
    monkeypatch.setattr(
        loop, "evaluate_loss", lambda *_: {"loss": next(values), "num_examples": 9, "num_target_tokens": 100}
    )
    assert train("full", paths, tmp_path / "out", load_best_model_at_end=True) == 0
    assert "the best model, of step 8, could not be kept" in caplog.text
    best = load_file(tmp_path / "out" / "checkpoints" / "best_step_000004" / "model.safetensors")
    exported = load_file(tmp_path / "out" / WEIGHTS["full"])
    assert [name for name in best if not exported[name].equal(best[name])] == []


@pytest.mark.slow
def test_the_best_by_rouge(paths, tmp_path, monkeypatch):
    """The highest, of summaries of all nine rows and their real references."""
    scored, values = [], iter([0.1, 0.2, 0.4, 0.3])

    def score_texts(predictions, references, use_stemmer, tokenizer):
        scored.append((predictions, references))
        return {"rougeL": [[next(values)] for _ in predictions[:1]]}

    monkeypatch.setattr("utils.scoring.metrics.rouge.score_texts", score_texts)
    assert train("full", paths, tmp_path / "out", metric_for_best_model="rougeL") == 0
    lines = [line for line in read_jsonl(tmp_path / "out" / "metrics.jsonl") if line["split"] == "validation"]
    assert [line["rougeL"] for line in lines] == [0.1, 0.2, 0.4, 0.3]
    assert [path.name for path in find_checkpoints(tmp_path / "out", "best_step")] == ["best_step_000008"]
    rows = read_jsonl(Path(paths["validation_file"]))
    assert [reference for _, references in scored[:1] for reference in references] == [
        [row["summary"]] for row in rows
    ]
    assert [len(predictions) for predictions, _ in scored] == [9] * 4
    assert scored[0][0] != scored[3][0], "the summaries are of the model as it is then"


def test_the_best_needs_a_validation_set(paths, tmp_path):
    with pytest.raises(UserError, match="--validation_file is missing"):
        train("full", paths | {"validation_file": None}, tmp_path / "out", load_best_model_at_end=True)
    assert not (tmp_path / "out").exists()


def test_the_best_is_no_checkpoint(paths, copy_of_stopped):
    best = find_checkpoints(copy_of_stopped, "best_step")[0]
    with pytest.raises(UserError, match="not the name of a checkpoint"):
        train("full", paths, copy_of_stopped, resume_from_checkpoint=str(best))


def test_a_linked_checkpoint(paths, copy_of_stopped, never_stopped, tmp_path):
    """On another disk, say: it is this run's, and nothing is cleared away."""
    shutil.move(copy_of_stopped / "checkpoints" / "step_000008", tmp_path / "elsewhere")
    (copy_of_stopped / "checkpoints" / "step_000008").symlink_to(tmp_path / "elsewhere")
    assert resume("full", paths, copy_of_stopped) == 0
    check_same("full", copy_of_stopped, never_stopped["full"])
    verify_checkpoint(tmp_path / "elsewhere")


def test_a_last_good_model_is_not_cleared_away(paths, tmp_path):
    (tmp_path / "out" / "last_good_model").mkdir(parents=True)
    with pytest.raises(UserError, match="holds a run already"):
        resume("full", paths, tmp_path / "out")


def test_a_step_taken_again_replaces_its_checkpoint(paths, copy_of_stopped):
    """With other steps between the log's lines, the record up to it is another: the line of step 5 is due now."""
    settings = {"logging_steps": 1, "resume_from_checkpoint": str(copy_of_stopped / "checkpoints" / "step_000005")}
    assert stop_in_step(8, "full", paths, copy_of_stopped, **settings) == EXIT_STOPPED
    record = read_jsonl(copy_of_stopped / "checkpoints" / "step_000008" / "metrics.jsonl")
    assert [line["step"] for line in record if line["split"] == "train"] == [3, 5, 6, 7, 8]


def test_a_checkpoint_of_another_folder_is_there_from_the_start(paths, never_stopped, stopped, tmp_path):
    """Ended, and queued again, before its own first checkpoint, the run has something to resume from."""
    there, output_dir = stopped["full"] / "checkpoints" / "step_000005", tmp_path / "out"

    def fail():
        while not find_checkpoints(output_dir):
            time.sleep(0.01)
        raise ConnectionError("the node is gone")

    with acting_in_step(6, fail), pytest.raises(ConnectionError):
        train("full", paths, output_dir, resume_from_checkpoint=str(there))
    assert resume("full", paths, output_dir) == 0
    check_same("full", output_dir, never_stopped["full"])
    steps = [(line["step"], line["split"]) for line in read_jsonl(output_dir / "metrics.jsonl")]
    assert len(steps) == len(set(steps))


def skip_all_but(steps: dict, validate):
    def validate_some(accelerator, model, tokenizer, data, config, step, *others):
        if step and step not in steps:
            return True
        return validate(accelerator, model, tokenizer, data, config, step, *others)

    return validate_some


def test_the_best_is_that_of_the_lowest_loss(never_stopped):
    for folder in never_stopped.values():
        losses = {step: loss for step, split, loss, _ in read_record(folder) if split == "validation" and step}
        [best] = find_checkpoints(folder, "best_step")
        assert step_of(best) == min(losses, key=losses.get)
        verify_checkpoint(best)
        assert not (best / "optimizer.safetensors").exists()


def test_a_lora_checkpoint_is_the_adapter(never_stopped):
    folder = find_checkpoints(never_stopped["lora"])[0]
    weights, moments = load_file(folder / "model.safetensors"), load_file(folder / "optimizer.safetensors")
    adapter = load_file(never_stopped["lora"] / "adapter_model.safetensors")
    assert {name.replace(".default", "") for name in weights} == set(adapter)
    assert all(weights[name].equal(adapter[name.replace(".default", "")]) for name in weights)
    assert set(moments) == {f"{name}.{key}" for name in weights for key in ("step", "exp_avg", "exp_avg_sq")}
    size = sum(tensor.numel() * 4 for tensor in weights.values())
    written = sum(path.stat().st_size for path in folder.iterdir())
    assert 3 * size < written < 3 * size + 40_000  # names and records, of which a real adapter's are no greater


# --- a disk that fails ---------------------------------------------------------------------------------------------


def test_a_full_disk(paths, never_stopped, small_disk, caplog):
    """Room for the best, one checkpoint and the export, not for a second checkpoint."""
    output_dir = small_disk(2000) / "out"
    assert train("full", paths, output_dir) == 0
    check_same("full", output_dir, never_stopped["full"])
    assert "a checkpoint could not be written: " in caplog.text
    assert "No space left on device; the newest checkpoint is step_000005" in caplog.text
    assert sorted(os.listdir(output_dir / "checkpoints")) == ["best_step_000012", "step_000005"]
    for kind in ("step", "best_step"):
        verify_checkpoint(find_checkpoints(output_dir, kind)[0])


@pytest.mark.slow
@pytest.mark.parametrize(("split", "step"), [("train", 6), ("validation", 8), ("validation", 0)])
def test_a_line_that_a_full_disk_refuses_ends_the_run(paths, never_stopped, tmp_path, monkeypatch, split, step):
    """After a checkpoint, from which the line is written when the run is resumed."""
    append_line, full = tracking.append_line, True

    def refuse(path, line):
        if full and json.loads(line)["split"] == split and json.loads(line)["step"] == step:
            raise OSError(errno.ENOSPC, "No space left on device")
        append_line(path, line)

    monkeypatch.setattr(tracking, "append_line", refuse)
    then = f"step {step} is saved, resume with --resume_from_checkpoint latest" if step else "no update has been done"
    text = f"metrics.jsonl: No space left on device; {then}$"
    with pytest.raises(UserError, match=text):
        train("full", paths, tmp_path / "out")
    full = False
    assert resume("full", paths, tmp_path / "out") == 0
    check_same("full", tmp_path / "out", never_stopped["full"])


@pytest.mark.slow
def test_a_full_disk_takes_no_line(paths, small_disk):
    """Nor a checkpoint of the step; the run is resumed from the one before."""
    output_dir = small_disk(8000) / "out"
    filling = output_dir.parent / "filling"

    def fill():
        while not find_checkpoints(output_dir):  # what the thread has begun would be removed, and make room again
            time.sleep(0.01)
        with contextlib.suppress(OSError), filling.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    settings = {"max_train_steps": 60, "logging_steps": 1, "eval_steps": 100, "checkpointing_steps": 2}
    with (
        acting_in_step(3, fill),
        pytest.raises(UserError, match="metrics.jsonl: No space .* but its checkpoint could"),
    ):
        train("full", paths, output_dir, **settings)
    lines = read_jsonl(output_dir / "metrics.jsonl")  # the file's last page had room for some
    filling.unlink()
    assert resume("full", paths, output_dir, **settings) == 0
    assert [line["loss"] for line in read_jsonl(output_dir / "metrics.jsonl")[: len(lines)]] == [
        line["loss"] for line in lines
    ]


@pytest.mark.slow
def test_a_stop_on_a_full_disk(paths, never_stopped, small_disk):
    """The checkpoint of step 5 is kept, and resumed from when there is room."""
    output_dir = small_disk(1700) / "out"
    text = "stopped after step 8, but its checkpoint could not be written: .*No space left .* is step_000005$"
    with pytest.raises(UserError, match=text):
        stop_in_step(8, "full", paths, output_dir)
    subprocess.run(["mount", "-o", "remount,size=8m", str(output_dir.parent)], check=True)
    (output_dir / "STOP").unlink(missing_ok=True)
    assert resume("full", paths, output_dir) == 0
    check_same("full", output_dir, never_stopped["full"])


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_no_room_for_the_export(paths, small_disk, num_processes):
    """One line and no hang; when there is room, the last checkpoint is exported without another update."""
    output_dir = small_disk(1100) / "out"
    words = ["train_full.py", "--output_dir", output_dir]
    for name, value in (SETTINGS | paths | {"checkpointing_steps": 100, "eval_steps": 100}).items():
        words += [f"--{name}", value] if name != "validation_file" else []
    run = run_script(*words, num_processes=num_processes)
    assert run.returncode == (2 if num_processes == 1 else 1)  # torchrun's
    lines = [line for line in run.stderr.splitlines() if "error: " in line and "train_full.py" in line]
    text = "No space left on device; when it can, export it with --resume_from_checkpoint latest"
    assert lines == [f"train_full.py: error: --output_dir {output_dir}: the model could not be written: {text}"]
    assert "[rank0]: Traceback" not in run.stderr
    left = sorted(os.listdir(output_dir))
    assert left == ["checkpoints", "metrics.jsonl", "run_manifest.json"]
    subprocess.run(["mount", "-o", "remount,size=8m", str(output_dir.parent)], check=True)
    run = run_script(*words, "--resume_from_checkpoint", "latest", num_processes=num_processes)
    assert run.returncode == 0, run.stderr
    weights = load_file(output_dir / "checkpoints" / "step_000012" / "model.safetensors")
    exported = load_file(output_dir / "model.safetensors")
    assert [name for name in weights if not exported[name].equal(weights[name])] == []


@pytest.mark.slow
def test_no_room_at_the_start(paths, small_disk):
    disk = small_disk(16)
    (disk / "theirs").write_bytes(bytes(16 * 1024))
    run = run_script("train_lora.py", *(f"--{name}={value}" for name, value in (paths | {"output_dir": disk}).items()))
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1] == (
        f"train_lora.py: error: {disk / 'run_manifest.json'}: No space left on device"
    )
    assert os.listdir(disk) == ["theirs"]


@pytest.mark.slow
def test_a_read_only_disk(paths, copy_of_stopped, small_disk):
    """At the start, and for a run to be resumed, whose STOP file and metrics it would have to change."""
    disk = small_disk(8000)
    shutil.copytree(copy_of_stopped, disk / "out")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for settings in ({"output_dir": disk / "new"}, {"output_dir": disk / "out", "resume_from_checkpoint": "latest"}):
        run = run_script(
            "train_full.py", *(f"--{name}={value}" for name, value in (SETTINGS | paths | settings).items())
        )
        assert run.returncode == 2
        folder = settings["output_dir"]
        assert run.stderr.splitlines()[-1] == (
            f"train_full.py: error: --output_dir {folder}: cannot write to {folder if folder.exists() else disk}"
        )


@pytest.fixture
def largest_file():
    """A function that sets how many bytes a file can have."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_file_too_large(paths, never_stopped, tmp_path, largest_file, caplog):
    """No optimizer.safetensors can be written, and the weights can."""
    largest_file(400_000)
    assert train("full", paths, tmp_path / "out") == 0
    check_same("full", tmp_path / "out", never_stopped["full"])
    assert caplog.text.count("File too large; the newest checkpoint is none") == 3
    assert os.listdir(tmp_path / "out" / "checkpoints") == ["best_step_000012"]


def test_no_folder_can_be_made(paths, never_stopped, tmp_path, caplog):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoints").touch()
    assert train("full", paths, tmp_path / "out") == 0
    check_same("full", tmp_path / "out", never_stopped["full"])
    assert caplog.text.count("a checkpoint could not be written: ") == 6


@pytest.mark.parametrize("error", [RuntimeError("what now"), SafetensorError("what now")])
def test_a_mistake_in_the_writer_is_seen(paths, tmp_path, monkeypatch, error):
    def fail(tensors, path):
        raise error

    monkeypatch.setattr(checkpoint_files, "save_file", fail)
    with pytest.raises(type(error), match="what now"):
        train("full", paths, tmp_path / "out")


# --- all of it -----------------------------------------------------------------------------------------------------


def test_nothing_loaded_can_run_code():
    for path in [*REPOSITORY.glob("*.py"), *REPOSITORY.glob("utils/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in getattr(node, "names", []) if isinstance(alias, ast.alias)]
            words = {getattr(node, "attr", ""), getattr(node, "module", ""), *names}
            words = set() if words >= {"UnpicklingError"} else words  # the error alone
            assert not words & {"pickle", "load_state", "dill", "joblib"}, path
            assert ast.unparse(node) != "torch.load" if isinstance(node, ast.Attribute) else True, path


if __name__ == "__main__":
    torch.set_num_threads(1)
    take_orders(sys.argv[1])
