"""Run a script in a fork of a process that has imported the libraries already. Importing them takes several times as
long as the work of most tests.

    python tests/warm.py serve SOCKET PID                  import them, and fork for each of the following until the
                                                           process PID ends
    WARM_SOCKET=SOCKET python tests/warm.py train_full.py ...
    WARM_SOCKET=SOCKET python tests/warm.py -m torch.distributed.run ... tests/warm.py train_full.py ...

The fork takes over the caller's arguments, environment, working directory and standard streams; the caller's signals
are passed on to it, and its exit code becomes the caller's. KILL is passed on as SIGKILL: after a real one the caller
would be gone while its fork may still run. At its end a fork leaves out freeing its modules and the libraries' own
tidying, which would take half a second. Do not use it to test import-time behaviour, the memory of a whole process, a
script's parent processes, or the very end of one.
"""

import atexit
import contextlib
import gc
import importlib
import io
import marshal
import os
import runpy
import select
import signal
import socket
import sys
import weakref

IMPORTED = (
    "train_full", "train_lora", "evaluate_rouge", "summarize", "torch.distributed.run",
    "accelerate.commands.accelerate_cli",
    # What the libraries and scripts import only when they need it.
    "deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.ops.op_builder.all_ops",
    "deepspeed.module_inject.auto_ep_layer", "deepspeed.runtime.superoffload.superoffload_stage3",
    "matplotlib.figure", "matplotlib.backends.backend_agg",
)  # fmt: skip
KILL = signal.SIGRTMIN
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, KILL)


def run_in_fork():
    """Have the server's fork run the command line, then exit as it did."""
    job = {"argv": sys.argv[1:], "environment": dict(os.environ), "folder": os.getcwd()}
    job = marshal.dumps((os.getpid(), job))
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.environ["WARM_SOCKET"])
    socket.send_fds(connection, [len(job).to_bytes(8, "big")], [0, 1, 2])
    connection.sendall(job)
    for number in FORWARDED:
        signal.signal(number, lambda number, frame: connection.send(bytes([number])))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)  # slurm/launch.sh starts its processes with SIGUSR1 blocked
    code = int(connection.recv(16) or 1)
    if code < 0:
        if code != -signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


def import_libraries():
    """And fill their caches with what each run would work out anew, and which depends on nothing that it is given."""
    for name in IMPORTED:
        importlib.import_module(name)
    figure = sys.modules["matplotlib.figure"].Figure()
    figure.subplots().set_title("fonts")
    figure.savefig(io.BytesIO())
    # What bundles a report's charting library, for 2 s, would leave its memory to each fork.
    import subprocess  # not above: each caller would import it

    code = "import sys, vl_convert; sys.stdout.buffer.write(vl_convert.javascript_bundle().encode())"
    bundle = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout.decode()
    sys.modules["vl_convert"].javascript_bundle = lambda: bundle
    sys.modules["transformers.conversion_mapping"].get_checkpoint_conversion_mapping("t5")
    # torchrun asks eighteen times who has called it, which takes the longer the more modules there are.
    sys.modules["torch.distributed.elastic.rendezvous.dynamic_rendezvous"].get_method_name = lambda: "method"
    # For a CPU DeepSpeed compiles an all-reduce in shared memory, for a minute; on a GPU there is none. gloo does it.
    sys.modules["deepspeed.ops"].__compatible_ops__["deepspeed_shm_comm"] = False
    for tidying in weakref.finalize._registry:  # of what the libraries have made, and the forks only share
        tidying.atexit = False


def serve(path: str, owner: int) -> dict:
    """Fork for each caller, pass its signals on and the fork's exit code back, until `owner` ends. Returns only in a
    fork: the job to run.

    Args:
        owner: a process. This one and all forks end when it does, for whatever reason.
    """
    owner_ended = os.pidfd_open(owner)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    gc.collect()
    gc.freeze()  # so that the forks' garbage collections leave the pages that they share alone
    print("ready", flush=True)  # noqa: T201
    forks, callers, killed = {}, {}, set()  # a connection's fork, the connection of a fork's pidfd; of callers
    while True:
        ready, _, _ = select.select([listener, owner_ended, *forks.keys() - killed, *callers], [], [])
        if owner_ended in ready:
            for fork in forks.values():
                os.kill(fork, signal.SIGKILL)
            sys.exit()
        for connection in forks.keys() & ready:
            number = connection.recv(1)
            if not number:
                killed.add(connection)
            os.kill(forks[connection], signal.SIGKILL if number in (b"", bytes([KILL])) else number[0])
        for ended in callers.keys() & ready:
            connection = callers.pop(ended)
            _, status = os.waitpid(forks.pop(connection), 0)
            if connection not in killed:
                with contextlib.suppress(BrokenPipeError):  # killed since
                    connection.send(str(os.waitstatus_to_exitcode(status)).encode())
            killed.discard(connection)
            connection.close()
            os.close(ended)
        if listener in ready:
            connection, _ = listener.accept()
            size, files, _, _ = socket.recv_fds(connection, 8, 3)
            content = connection.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL)
            whole = size and len(content) == int.from_bytes(size, "big")  # or it was killed while it was asking
            fork = os.fork() if whole else None
            if fork == 0:
                break
            for file in files:
                os.close(file)
            if fork is None:
                connection.close()
                continue
            forks[connection] = fork
            callers[os.pidfd_open(fork)] = connection
            caller, _ = marshal.loads(content)
            with open(f"{path}-{caller}", "w") as file:  # for tests that signal the fork itself
                file.write(str(fork))
    for inherited in (listener, connection, *forks):
        inherited.close()
    for inherited in (owner_ended, *callers):
        os.close(inherited)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    _, job = marshal.loads(content)
    return job


def end(status: dict[str, int]):
    """The last that Python calls at a process's end, after its threads and all other such functions."""
    if "code" in status:
        for stream in (sys.stdout, sys.stderr):
            if stream and not stream.closed:
                stream.flush()
        os._exit(status["code"])


def run_to_the_end(job: dict, status: dict[str, int]):
    """Run the job, and have `end` know its exit code. A KeyboardInterrupt has none: Python itself ends with it."""
    try:
        run(**job)
        status["code"] = 0
    except SystemExit as stop:
        status["code"] = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        raise
    except Exception:
        status["code"] = 1
        raise


def run(argv: list[str], environment: dict[str, str], folder: str):
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.modules["utils.launch.stopping"].PARENT = os.getppid()
    module = argv[0] == "-m"
    sys.argv = argv[1:] if module else argv
    sys.path[0] = folder if module else os.path.dirname(os.path.abspath(argv[0]))
    if module:
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] != "serve":
        run_in_fork()
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    status = {}
    atexit.register(end, status)  # before those of the libraries: the first is called last
    import_libraries()
    del sys.path[0]
    run_to_the_end(serve(sys.argv[2], int(sys.argv[3])), status)
