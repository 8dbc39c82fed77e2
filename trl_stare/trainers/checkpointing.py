"""Checkpoints that are there whole or not at all, and one run per folder.

`Trainer` of transformers 5.23 writes `checkpoint-N` file by file, and resumes from the highest `N` it finds: a run that is killed
while it saves can never be continued, and a flipped byte or a lost `optimizer.pt` goes unnoticed. Here a checkpoint is written
beside its place, described by a manifest, and then renamed.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from trl_stare.files import file_digest

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
# what begins with "_" the Trainer does not upload with the rest of `output_dir`; to read the lock would also let go of it
STAGING_FOLDER = "_saving"
LOCK_FILE = "_lock"
STATE_FILE = "trainer_state.json"


def write_manifest(folder: str | Path, **facts: Any) -> None:
    """Force all files of `folder` to the disk, then list them in `manifest.json` with sizes in bytes and SHA-256.

    Args:
        facts: plain values that the manifest shall also hold, e.g. `step=120`.
    """
    folder = Path(folder)
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_FILE):
        _to_disk(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
    manifest = folder / MANIFEST_FILE
    manifest.write_text(json.dumps({**facts, "files": files}, indent=1) + "\n")
    for path in (manifest, *(path for path in folder.rglob("*") if path.is_dir()), folder):
        _to_disk(path)


def checkpoint_problems(folder: str | Path) -> list[str]:
    """What is wrong with a checkpoint, in words; an empty list if its manifest verifies.

    Example: `["optimizer.pt is missing", "model.safetensors differs from its SHA-256"]`.
    """
    folder = Path(folder)
    try:
        files = json.loads((folder / MANIFEST_FILE).read_text())["files"]
    except FileNotFoundError:
        return [f"it has no {MANIFEST_FILE}"]
    except (ValueError, KeyError, TypeError):
        return [f"{MANIFEST_FILE} is damaged"]
    return [problem for name, listed in files.items() if (problem := _file_problem(folder / name, name, listed))]


def latest_valid_checkpoint(folder: str | Path) -> str | None:
    """The newest `checkpoint-N` of `folder` whose manifest verifies; `None` if there is no checkpoint at all.

    Newest by `N`, not by the clock. Warns of every newer one that does not verify, and says why.

    Raises:
        ValueError: if there are checkpoints and none verifies.
    """
    found = {int(path.name.rsplit("-", 1)[1]): path for path in _checkpoints(Path(folder))}
    rejected = []
    for _, path in sorted(found.items(), reverse=True):
        problems = checkpoint_problems(path)
        if not problems:
            return str(path)
        rejected.append(f"{path.name}: {', '.join(problems)}")
        logger.warning("%s cannot be resumed from: %s. Trying the one before.", path, ", ".join(problems))
    if rejected:
        raise ValueError(
            f"`{folder}` must hold a checkpoint whose manifest verifies, got {'; '.join(rejected)}. Restore one from a "
            "backup, or use another `output_dir` to begin anew."
        )
    return None


@contextmanager
def sole_run(folder: str | Path) -> Iterator[None]:
    """Hold `folder` for this process for as long as the block runs.

    A POSIX record lock: it dies with its process, and worker processes do not inherit it, so that a worker which outlives a killed
    trainer does not keep the folder (https://man7.org/linux/man-pages/man2/F_SETLK.2const.html).

    Raises:
        RuntimeError: if another process holds it; names it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise RuntimeError(
                f"`output_dir` must belong to one run, got {folder} in which process {file.read() or '?'} is training. "
                "Wait for it, or use another `output_dir`."
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


class AtomicCheckpoints:
    """A [`~transformers.Trainer`] in whose `output_dir` every `checkpoint-N` is whole, and only one run trains.

    To be put before the trainer among the base classes. `Trainer` itself writes, into a folder beside, which is renamed when all
    processes are done and the manifest is written. `save_total_limit` works as ever, but by step, not by the clock.
    All processes must see the same `output_dir`. With `push_to_hub` a checkpoint is uploaded once it has its place.
    """

    _staging: str | None = None

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As [`~transformers.Trainer.train`], except for `resume_from_checkpoint`.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): `True` takes the newest checkpoint in `output_dir` whose manifest
                verifies, and begins from nothing where there is none; a path must verify.

        Raises:
            RuntimeError: if another run trains in `output_dir`.
            ValueError: if a checkpoint is damaged and there is none before it, or if a run that is not resumed left checkpoints.
        """
        if resume_from_checkpoint is not None and not isinstance(resume_from_checkpoint, bool):
            resume_from_checkpoint = str(resume_from_checkpoint)
        with sole_run(self.args.output_dir) if self.args.should_save else nullcontext():
            checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
            self._load_run_state(None if checkpoint is None else Path(checkpoint))
            return super().train(checkpoint, *args, **kwargs)

    def _checkpoint_to_resume(self, wanted: str | bool | None) -> str | None:
        """The main process looks, all are told: reading the whole checkpoint once is enough."""
        chosen = [None]
        if self.is_world_process_zero():
            chosen = [latest_valid_checkpoint(self.args.output_dir) if wanted is True else wanted or None]
            if isinstance(wanted, str) and (problems := checkpoint_problems(wanted)):
                raise ValueError(
                    f"`resume_from_checkpoint` must be a whole checkpoint, got {wanted}: {', '.join(problems)}. "
                    "`resume_from_checkpoint=True` takes the newest whole one."
                )
            if chosen[0]:
                self._compare_world_size(chosen[0])
            elif left := sorted(path.name for path in _checkpoints(Path(self.args.output_dir))):
                # of the two runs' checkpoints the higher numbers would be kept, and resumed from
                raise ValueError(
                    f"`output_dir` must hold no checkpoints where a run begins, got {', '.join(left)} in {self.args.output_dir}. "
                    "Continue that run by `train(resume_from_checkpoint=True)`, or use another folder."
                )
        return broadcast_object_list(chosen)[0]

    def _compare_world_size(self, checkpoint: str) -> None:
        before = json.loads((Path(checkpoint) / MANIFEST_FILE).read_text()).get("world_size")
        if before != self.args.world_size:
            logger.warning(
                "%s was written by %s processes and %s continue: the episodes are shared out anew, so that the run goes "
                "on, but not as it would have.",
                checkpoint,
                before,
                self.args.world_size,
            )

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Let `Trainer` write beside, then put the checkpoint in its place."""
        folder = Path(self._get_output_dir(trial))
        staging, name = folder / STAGING_FOLDER, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging, is_written = str(staging), False
        try:
            super()._save_checkpoint(model, trial)
            is_written = True
        finally:
            self._staging = None
            if not is_written:
                shutil.rmtree(staging, ignore_errors=True)  # a full disk shall not stay full
        best = self.state.best_model_checkpoint
        if best is not None and Path(best).parent == staging:
            self.state.best_model_checkpoint = str(folder / name)
        self.accelerator.wait_for_everyone()  # each process adds its own RNG state
        if self.args.should_save:
            self._save_run_state(staging / name)
            self.state.save_to_json(str(staging / name / STATE_FILE))
            write_manifest(staging / name, step=self.state.global_step, world_size=self.args.world_size)
            _publish(staging / name, folder / name)
            rotate_checkpoints(
                str(folder),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder / name))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Not from the folder beside: the upload goes on in the background, where it would find it renamed. Its failure is logged."""
        if self._staging is not None:
            return
        before = set(self.push_in_progress.jobs) if self.push_in_progress else set()
        super()._push_from_checkpoint(checkpoint_folder)
        for job in set(self.push_in_progress.jobs) - before if self.push_in_progress else ():
            job.add_done_callback(_report_failed_push)

    def _save_run_state(self, folder: Path) -> None:
        """What a subclass adds to a checkpoint; called in the main process only."""

    def _load_run_state(self, folder: Path | None) -> None:
        """Take it up again, in every process; `None` where a run begins."""


def _publish(staged: Path, final: Path) -> None:
    """Rename `staged` to `final`; what is there is an attempt of before that did not verify, or the same."""
    if final.exists():
        final.rename(staged.parent / "replaced")
    staged.rename(final)
    _to_disk(final.parent)
    shutil.rmtree(staged.parent, ignore_errors=True)


def _report_failed_push(job: Future) -> None:
    if not job.cancelled() and (error := job.exception()) is not None:
        logger.warning("a checkpoint was not uploaded to the Hub: %s: %s", type(error).__name__, error)


def _checkpoints(folder: Path) -> list[Path]:
    name = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d+")
    return [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir() and name.fullmatch(path.name)]


def _file_problem(path: Path, name: str, listed: dict[str, Any]) -> str | None:
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != listed["bytes"]:
        return f"{name} has {path.stat().st_size} bytes instead of {listed['bytes']}"
    return None if file_digest(path) == listed["sha256"] else f"{name} differs from its SHA-256"


def _to_disk(path: Path) -> None:
    """`fsync` of a file, or of a folder's list of names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
