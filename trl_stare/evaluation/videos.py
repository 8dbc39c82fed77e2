"""Videos of single episodes, the current stage written on each frame."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import imageio.v2 as imageio
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from trl_stare.data.rollout import play
from trl_stare.data.rollout import replay as replay_actions
from trl_stare.data.trajectory import Trajectory
from trl_stare.interfaces import Signals, VectorEnv, VLAPolicy
from trl_stare.stages import StagePlan

logger = logging.getLogger(__name__)


class Replay(NamedTuple):
    """One rendered episode of `T` environment steps.

    Attributes:
        seed (`int`): the episode's seed.
        frames (`np.ndarray`): `[T + 1, H, W, 3]` uint8, RGB; frame 0 is the initial state.
        stages (`Sequence[str]`): `T + 1` names, what [`stage_labels`] gives.
        success (`bool`): `success_once`.
    """

    seed: int
    frames: np.ndarray
    stages: Sequence[str]
    success: bool


def stage_labels(plan: StagePlan, signals: Signals) -> list[str]:
    """Name of the current stage at each of the `T + 1` moments of a trajectory, "Success" where the task is solved."""
    names = (*plan.names, "Success")
    return [names[index] for index in plan.current_stage(signals).tolist()]


def record_episode(
    frames: np.ndarray, labels: Sequence[str], path: str | os.PathLike, *, fps: int = 20, size: int = 384
) -> None:
    """Write `frames` as an H.264 mp4, each with its label on top, all of it or nothing.

    Args:
        frames (`np.ndarray`): `[T, H, W, 3]` uint8, RGB.
        labels (`Sequence[str]`): `T` captions.
        path (`str`): the `.mp4`; its folder is made.
        fps (`int`): frames per second; 20 is real time for ManiSkill's 20 Hz control.
        size (`int`): length of the longer side after scaling, in pixels; both sides are made even, as H.264 asks.

    Raises:
        ValueError: if shapes, dtype or lengths do not fit, or `path` is no `.mp4`.
    """
    frames, path = np.asarray(frames), Path(path)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(f"`frames` must be [T, H, W, 3] uint8 with T >= 1, got {frames.shape} {frames.dtype}.")
    if len(labels) != len(frames):
        raise ValueError(f"`labels` must hold one caption per frame, got {len(labels)} for {len(frames)} frames.")
    if path.suffix != ".mp4":
        raise ValueError(f"`path` must end in .mp4, got {path.name!r}.")
    height, width = frames.shape[1:3]
    scale = size / max(height, width)
    shape = (2 * round(width * scale / 2), 2 * round(height * scale / 2))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    with imageio.get_writer(
        partial, format="FFMPEG", fps=fps, codec="libx264", macro_block_size=2, pixelformat="yuv420p"
    ) as writer:
        for frame, label in zip(frames, labels, strict=True):
            writer.append_data(_caption(frame, label, shape))
    os.replace(partial, path)


def can_film(env: VectorEnv) -> bool:
    """Whether an episode of `env` can be played again in a larger picture; where not, that is logged.

    Args:
        env ([`VectorEnv`]): where the episodes are played. ManiSkill's GPU simulation does not repeat one bit for bit.
    """
    repeats = env.metadata.get("sim_backend") != "physx_cuda"
    if not repeats:
        logger.warning("no videos of %s: on CUDA an episode does not repeat itself exactly", env.task)
    return repeats


def film_policy(
    policy: VLAPolicy,
    env: VectorEnv,
    camera: VectorEnv,
    plan: StagePlan,
    seeds: Sequence[int],
    *,
    temperature: float,
    seed: int,
) -> list[Replay]:
    """Play `seeds` in `env` until one succeeded and one failed; render the first of each again, step by step, in `camera`.

    Args:
        env ([`VectorEnv`]): where the policy plays, in its own chunks.
        camera ([`VectorEnv`]): the same task with `chunk_size` 1 and images as large as the video's.
        seeds (`Sequence[int]`): played `env.num_envs` at a time.
        temperature (`float`), seed (`int`): of the sampling.

    Returns:
        at most two episodes; fewer if all succeeded or all failed.
    """
    generator = torch.Generator().manual_seed(seed)
    first: dict[bool, Trajectory] = {}
    for begin in range(0, len(seeds), env.num_envs):
        block = seeds[begin : begin + env.num_envs]
        for trajectory in play(env, policy, block, temperature=temperature, generator=generator):
            first.setdefault(trajectory.success_once, trajectory)
        if len(first) == 2:
            break
    return [_render(camera, first[outcome], plan) for outcome in (True, False) if outcome in first]


def film_episode(
    camera: VectorEnv, trajectory: Trajectory, plan: StagePlan, folder: str | os.PathLike, *, fps: int = 20
) -> Path:
    """Render a recorded episode again, step by step, and write `{policy}_{outcome}_seed{S}.mp4`, captioned "stage, step t of T".

    Args:
        camera ([`VectorEnv`]): the episode's task with `chunk_size` 1 and images as large as the video's.
        trajectory ([`Trajectory`]): what to show.
        folder (`str`): where to; it is made.

    Raises:
        ValueError: if `camera` does not repeat the episode.
    """
    replay = _render(camera, trajectory, plan)
    outcome = "success" if replay.success else "failure"
    path = Path(folder) / f"{Path(trajectory.policy).name}_{outcome}_seed{replay.seed}.mp4"
    record_episode(replay.frames, _captions(replay), path, fps=fps)
    return path


def _render(camera: VectorEnv, trajectory: Trajectory, plan: StagePlan) -> Replay:
    seen = replay_actions(camera, trajectory)
    frames = torch.cat([seen.images, seen.final_image[None]]).numpy()
    return Replay(seen.seed, frames, stage_labels(plan, seen.signals), seen.success_once)


def _captions(replay: Replay) -> list[str]:
    last = len(replay.frames) - 1
    return [f"{stage}  step {step}/{last}" for step, stage in enumerate(replay.stages)]


def save_success_and_failure(
    folder: str | os.PathLike, phase: str, replays: Iterable[Replay], *, fps: int = 20
) -> dict[str, Path]:
    """Write the first success and the first failure among `replays`, captioned "stage, step t of T".

    Returns:
        `{"success": path, "failure": path}`, named `{phase}_{outcome}_seed{S}.mp4`, without an outcome that did not occur:
        that is logged, since a policy that never fails is no error.
    """
    written: dict[str, Path] = {}
    for replay in replays:
        outcome = "success" if replay.success else "failure"
        if outcome in written:
            continue
        path = Path(folder) / f"{phase}_{outcome}_seed{replay.seed}.mp4"
        record_episode(replay.frames, _captions(replay), path, fps=fps)
        written[outcome] = path
    for outcome in {"success", "failure"} - written.keys():
        logger.warning("no %s among the replayed episodes of %s: no such video", outcome, phase)
    return written


def _caption(frame: np.ndarray, label: str, shape: tuple[int, int]) -> np.ndarray:
    """Scale `frame` to `shape` (width, height) and write `label` on a dark strip along its top."""
    image = Image.fromarray(frame).resize(shape, Image.Resampling.BICUBIC)
    text_height = max(10, shape[1] // 18)
    strip = Image.new("RGB", (shape[0], 2 * text_height), (0, 0, 0))
    box = (0, 0, *strip.size)
    image.paste(Image.blend(image.crop(box), strip, 0.6), box)
    ImageDraw.Draw(image).text(
        (text_height // 2, text_height),
        label,
        fill=(255, 255, 255),
        font=ImageFont.load_default(text_height),
        anchor="lm",
    )
    return np.asarray(image)
