"""What the processes of a run must agree on, though each plays episodes and draws noise of its own."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.elastic.utils.distributed import get_free_port
from transformers import TrainerCallback

PR_SET_PDEATHSIG = 1
"""`prctl(2)`: the signal that a process gets when its parent ends."""


def end_with_launcher() -> None:
    """Let this process be killed when the launcher that started it and others is (Linux only).

    torch's launcher gives each process a session of its own (`SubprocessHandler._popen`): they would survive a SIGKILL of the launcher, and
    the next launch would wait for ever at the port that they still hold. Nothing is done where no such launcher is: a process may
    outlive the shell it was begun in. One whose launcher ends before this call finds no store to meet the others in, and ends too.
    """
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def meet_anew_after_restart() -> None:
    """Let processes that the launcher started again (`--max_restarts`) find each other, and not those that died.

    They would meet in the launcher's store, where torch 2.13 finds the addresses of the dead ones under the same keys: gloo waits for
    these until its time is over (torch/distributed/rendezvous.py, `_create_c10d_store`; earlier releases put the attempt before
    each key). So the first process opens a store for this attempt. Must run before the process group is made.
    """
    environ, attempt = os.environ, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if not attempt or environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or dist.is_initialized():
        return
    launcher = dist.TCPStore(environ["MASTER_ADDR"], int(environ["MASTER_PORT"]), is_master=False)
    key = f"trl_stare/port_of_attempt_{attempt}"
    if environ["RANK"] == "0":
        launcher.set(key, str(get_free_port()))
    environ |= {"MASTER_PORT": launcher.get(key).decode(), "TORCHELASTIC_USE_AGENT_STORE": "False"}


class OwnRandomness(TrainerCallback):
    """Lets each process draw its own dropout and, for a flow policy, its own times and noises: the Trainer seeds all alike.

    As training begins, not before: the first weights of an adapter and the order of the rows, which accelerate takes from the
    global seed, must be the same everywhere.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Seed torch by the process."""
        if args.world_size > 1:
            torch.manual_seed(args.seed + args.process_index)


def total(accelerator: Accelerator, values: Tensor) -> Tensor:
    """Sum of `values` over all processes, in float64; the shape is kept."""
    if accelerator.num_processes == 1:
        return values.double()
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
    return accelerator.reduce(values.to(accelerator.device, dtype), "sum").to(values.device)


def global_moments(accelerator: Accelerator, values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (`n - 1`) over dimension 0 of `[M]` or `[M, F]`, where `M` differs between processes.

    Not a `gather`: it would need the same `M` everywhere, and wait for ever where it is not.
    """
    rows = values.double()
    count = total(accelerator, torch.tensor(float(len(rows)), device=values.device))
    mean = total(accelerator, rows.sum(dim=0)) / count
    squares = total(accelerator, ((rows - mean) ** 2).sum(dim=0))
    return mean.to(values.dtype), (squares / (count - 1).clamp(min=1)).sqrt().to(values.dtype)


def gradient_weights(accelerator: Accelerator, counts: Tensor) -> Tensor:
    """By what a process must weight its mean loss over `counts` items, for the average over processes to be the mean over all items.

    DDP averages gradients over processes: `1/W sum_r w_r mean_r` is the mean over all items if `w_r = W n_r / sum_r n_r`.

    Example: with 30 and 10 items in two processes, 1.5 and 0.5; in a single process always 1.
    """
    return (accelerator.num_processes * counts.double() / total(accelerator, counts).clamp(min=1)).float()


def gather_rows(accelerator: Accelerator, rows: Sequence[dict]) -> list[dict]:
    """The rows of all processes, of the first process first; any number from each."""
    if accelerator.num_processes == 1:
        return list(rows)
    gathered: list = [None] * accelerator.num_processes
    dist.all_gather_object(gathered, list(rows))
    return [row for part in gathered for row in part]


class Rendezvous:
    """Where processes wait for each other after uneven work, and learn who is missing.

    Gloo's `monitored_barrier` names the ranks that do not come; the timeout of an ordinary collective does not.

    Args:
        accelerator (`Accelerator`): of the run.
        timeout_s (`float`): how long to wait.
    """

    def __init__(self, accelerator: Accelerator, timeout_s: float):
        self.timeout = timedelta(seconds=timeout_s)
        self.group = None
        if accelerator.num_processes > 1:
            self.group = dist.new_group(backend="gloo", timeout=self.timeout)

    def wait(self) -> None:
        """Return when all processes are here.

        Raises:
            RuntimeError: names the ranks that did not come in time.
        """
        if self.group is not None:
            dist.monitored_barrier(self.group, timeout=self.timeout, wait_all_ranks=True)
