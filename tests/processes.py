"""Runs a function in several processes that form one gloo group, and commands that start such processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist


def _enter(rank, world_size, function, directory, arguments):
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    store = dist.FileStore(str(directory / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    result = function(rank, world_size, *arguments)
    torch.save(result, directory / f"result-{rank}")
    dist.barrier()
    (directory / f"done-{rank}").touch()
    while not all((directory / f"done-{other}").exists() for other in range(world_size)):
        time.sleep(0.01)
    os._exit(0)  # gloo can hang or abort when torch frees a Reducer at the end


def run(function, world_size, directory, *arguments):
    """Return what `function(rank, world_size, *arguments)` returned in each of `world_size` fresh processes."""
    directory = Path(directory)
    torch.multiprocessing.spawn(_enter, (world_size, function, directory, arguments), nprocs=world_size)
    return [torch.load(directory / f"result-{rank}", weights_only=True) for rank in range(world_size)]


def command(arguments, cwd, environment, seconds=150):
    """Run a command to its end and return what it printed; one that hangs is killed with what it started."""
    options = {"cwd": cwd, "env": environment, "text": True, "start_new_session": True}
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
        try:
            stdout, stderr = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            _kill(process)
            raise
    return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)


def launch(directory, num, *arguments, **environment):
    """Run `hf-ivon ARGUMENTS` in so many processes, started as users start them, and return what it printed."""
    root = str(Path(__file__).parent.parent)
    variables = {**os.environ, "PYTHONPATH": root, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(num)]
    torchrun += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "-m", "tests.run_and_exit"]
    start = torchrun if num > 1 else ["-m", "hf_ivon"]
    return command([sys.executable, *start, *arguments], directory, variables)


def _kill(process):
    """Kill a launcher and what it started; torchrun gives its children sessions of their own."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    for pid in [*map(int, found), process.pid]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.communicate()
