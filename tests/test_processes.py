"""What one of several processes alone meets is told, and none of them outlives its launcher."""

import contextlib
import os
import sys
import time

import psutil
import pytest
from conftest import make_rows, run_command, run_script, start_script, start_warm_server, write_rows

from utils.launch.script import report_mistake

pytestmark = pytest.mark.slow
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.mark.parametrize("wrong_on", ["1", "01"])
def test_a_mistake_of_one_process_is_told_once(flan_t5, data_files, tmp_path, wrong_on):
    words = [
        "train_full.py", "--model_name_or_path", flan_t5, "--output_dir", tmp_path / "out", "--mixed_precision", "no",
        "--train_file",
    ]  # fmt: skip
    choose = (
        f'case {wrong_on} in *$RANK*) file={tmp_path}/none.csv;; *) file={data_files["train"]};; esac; exec "$@" $file'
    )
    environment = {"ACCELERATE_USE_CPU": "true", "WARM_SOCKET": start_warm_server()}
    command = [sys.executable, "tests/warm.py", *TORCHRUN, "--no-python", "bash", "-c", choose, "bash"]
    run = run_command(*command, sys.executable, "tests/warm.py", *words, **environment)
    assert run.returncode != 0
    lines = [line for line in run.stderr.splitlines() if "error: " in line]
    process = "process 1: " if wrong_on == "1" else ""
    assert lines == [f"train_full.py: error: {process}{tmp_path}/none.csv: no such file"]


def test_an_error_of_another_process_starts_on_a_line_of_its_own(monkeypatch):
    """And not behind the main process's progress bar."""
    terminal, inside = os.openpty()
    with os.fdopen(inside, "w") as stream:
        monkeypatch.setattr("sys.stderr", stream)
        monkeypatch.setattr("sys.argv", ["train_full.py"])
        monkeypatch.setenv("RANK", "2")
        stream.write(" 10%|#")
        report_mistake("no such file")
        stream.flush()
        lines = os.read(terminal, 1000).decode().splitlines()
    os.close(terminal)
    assert lines == [" 10%|#", "train_full.py: error: process 2: no such file"]


def test_a_process_whose_others_never_come_gives_up(tmp_path):
    script = tmp_path / "lonely.py"
    script.write_text("from utils.launch import processes as p; p.MINUTES_TO_MEET = 0.05; p.start_processes()")
    started = time.monotonic()
    others = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    run = run_script(script, **others)
    assert run.returncode == 2
    text = "lonely.py: error: process 1 of 2: the others did not all connect to 127.0.0.1:9 within 0.05 minutes"
    assert run.stderr.splitlines()[-1] == text
    assert time.monotonic() - started < 120


# While the libraries are imported; while texts are generated.
@pytest.mark.parametrize("early", [True, False])
def test_no_process_outlives_a_launcher_that_is_killed(flan_t5, tmp_path, early):
    test_file = write_rows(tmp_path / "test.jsonl", make_rows(2000))
    words = [
        "evaluate_rouge.py", "--models", f"model={flan_t5}", "--test_file", test_file, "--output_dir",
        tmp_path / "out", "--max_new_tokens", 100, "--per_device_eval_batch_size", 1,
    ]  # fmt: skip
    launcher = start_script(*TORCHRUN, *words)

    def find_processes() -> list[psutil.Process]:
        """That run the script, but for the launcher."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if str(tmp_path) in " ".join(process.cmdline()) and process.pid != launcher.pid:
                    found.append(process)
        return found

    def wait_until(is_so):
        deadline = time.monotonic() + 120
        while not is_so():
            assert time.monotonic() < deadline
            time.sleep(0.1)

    if early:
        wait_until(lambda: len(find_processes()) == 2)
        time.sleep(1)  # the first line of the script; its imports take several
    else:
        wait_until(lambda: len(list(tmp_path.glob("out/predictions.partial-*"))) == 2)
    assert len(find_processes()) >= 2
    launcher.kill()
    launcher.wait()
    wait_until(lambda: not find_processes())
    assert not (tmp_path / "out" / "results.json").exists()
