"""Between two rollouts: the only moments at which a PPO run is logged, evaluated, saved and stopped."""

from __future__ import annotations

import logging
import signal
import threading
import time
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState

logger = logging.getLogger(__name__)


class RolloutStopped(Exception):
    """Raised between two episodes of a rollout to give it up; what it has played is not learned from."""


class StopRequest:
    """SIGTERM as a flag that is looked at between steps; a second SIGTERM ends the process at once.

    Schedulers send it some time before they kill: Kubernetes and Slurm 30 s, clouds up to two minutes.

    Example:

    ```python
    >>> with StopRequest() as stop:
    ...     while not stop.requested:
    ...         work()
    ```
    """

    def __init__(self):
        self.requested, self._since = False, 0.0

    def __enter__(self) -> StopRequest:
        self.requested = False
        self._is_main = threading.current_thread() is threading.main_thread()  # only there may a handler be set
        if self._is_main:
            self._before = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._is_main:
            signal.signal(signal.SIGTERM, self._before)

    def waited_longer_than(self, seconds: float) -> bool:
        """Whether a request was made more than `seconds` ago."""
        return self.requested and time.monotonic() - self._since > seconds

    def _handle(self, number: int, frame: object) -> None:
        self.requested, self._since = True, time.monotonic()
        signal.signal(signal.SIGTERM, self._before)


class RolloutBoundaries(TrainerCallback):
    """Moves saving and evaluation to the end of the iteration, logs there, and stops there after a SIGTERM.

    In the middle of an iteration a checkpoint could not be continued exactly: its rollout was played by a policy that is no more.

    Args:
        trainer ([`StagePPOTrainer`]): whose run it is.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self._due: set[str] = set()
        self._saved_step = 0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Where the run begins or goes on, nothing is to be saved."""
        self._due, self._saved_step = set(), state.global_step

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put off what is due; give the iteration up if the time of grace is over."""
        for name in ("should_save", "should_evaluate"):
            if getattr(control, name):
                setattr(control, name, False)
                self._due.add(name)
        if self.trainer.must_stop(grace=args.stop_grace_s):
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Do what is due."""
        if state.global_step % args.updates_per_iteration:
            control.should_save = control.should_evaluate = False
            logger.warning("Stopped within an iteration, which is not saved: resuming repeats it.")
            return
        for name in self._due:
            setattr(control, name, True)
        self._due.clear()
        # what was measured since the last log is not in a checkpoint
        control.should_log = args.logging_strategy != "no"
        if self.trainer.must_stop():
            control.should_evaluate, control.should_training_stop = False, True
            control.should_save = state.global_step > self._saved_step
            logger.warning("SIGTERM: stopping after %d updates. The same command continues.", state.global_step)

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remember, so that nothing is saved twice."""
        self._saved_step = state.global_step


class UpdateGuard(TrainerCallback):
    """Skips updates whose loss or gradient is not finite, in all processes alike, and ends the run after too many in a row.

    Without a gradient an optimizer leaves a parameter and its moments alone: so also the policy's while it is held, as Adam would
    count updates with a gradient of 0 and make the first real steps too large. DeepSpeed updates within `backward`: there the
    update is not skipped, only counted.

    Args:
        trainer ([`StagePPOTrainer`]): whose run it is.

    Attributes:
        skipped (`int`): updates skipped in this run. in_a_row (`int`): how many of them since the last good one.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.skipped = self.in_a_row = 0
        self._loss_was_finite = True

    def look_at(self, loss: torch.Tensor) -> None:
        """Remember whether the loss of a micro-batch is finite."""
        self._loss_was_finite &= bool(torch.isfinite(loss))

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, optimizer: Any, **kwargs: Any
    ) -> None:
        """Take the gradients away if the update would do harm.

        Raises:
            FloatingPointError: after `max_skipped_updates` in a row.
        """
        is_good = self._loss_was_finite and _are_finite(optimizer)
        self._loss_was_finite = True
        if not self.trainer.any_process(not is_good):
            self.in_a_row = 0
            if self.trainer.holds_policy:
                for parameter in optimizer.param_groups[0]["params"]:
                    parameter.grad = None
            return
        optimizer.zero_grad(set_to_none=True)
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        logger.warning("Update %d was skipped: its loss or gradient is not finite.", state.global_step + 1)
        if self.in_a_row >= args.max_skipped_updates:
            raise FloatingPointError(
                f"loss and gradients must be finite, got {self.in_a_row} updates in a row that are not (the last is update "
                f"{state.global_step + 1}). Lower `learning_rate`, or resume from the last checkpoint with another `seed`."
            )


def _are_finite(optimizer: torch.optim.Optimizer) -> bool:
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return not grads or bool(torch.isfinite(torch.nn.utils.get_total_norm(grads)))
