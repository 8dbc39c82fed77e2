"""From stage pairs to batches: the rows that [`StageDPOTrainer`] trains on, and the collator that flattens them."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, Image, List, Value
from torch import Tensor

from trl_stare.data.pairs import StagePair
from trl_stare.data.parquet import to_table
from trl_stare.data.schema import image_cell
from trl_stare.data.trajectory import Trajectory
from trl_stare.interfaces import Observation, VLAPolicy, token_steps

SIDES = ("chosen", "rejected")
ROWS_PER_TABLE = 64
"""Pairs that are converted at once."""
ENCODED_BYTES = 2**28
"""Encoded images that are kept while pairs are converted; at 64 px 0.1 MB an episode. With `ROWS_PER_TABLE` pairs, what is in memory
beside the dataset itself."""
NO_IMAGES = torch.zeros(0, 0, 0, 3, dtype=torch.uint8)

# No column may be called `image` or `images`: DPOTrainer would take the rows for chats with pictures.
PAIR_FEATURES = Features(
    {
        "task": Value("string"),
        "instruction": Value("string"),
        "seed": Value("int64"),
        "stage": Value("int64"),
        "stage_name": Value("string"),
        **{
            f"{side}_{name}": feature
            for side in SIDES
            for name, feature in {
                "frames": List(Image()),
                "state": List(List(Value("float32"))),
                "trace": List(List(Value("int64"))),
                "taken": List(List(Value("int64"))),
                "cost": Value("float64"),
            }.items()
        },
    }
)
"""Columns of a training row: a pair with the `M` decisions of each side's segment. `taken` `[M, 2]` is the half-open slice of
a decision's chunk that was executed in the segment: at its ends a chunk may reach into another stage, or beyond the episode."""


def pairs_dataset(
    trajectories: Sequence[Trajectory], pairs: Sequence[StagePair], *, file: str | Path | None = None
) -> Dataset:
    """Put the decisions of each pair's segments into one row per pair, for [`StageDPOTrainer`].

    Args:
        trajectories (`Sequence[Trajectory]`): what the pairs were built from; a [`TrajectoryFolder`] stays on disk.
        pairs (`Sequence[StagePair]`): see [`build_pairs`].
        file (`str` or `Path`, *optional*): an Arrow file that the rows are written to and mapped from, for datasets that
            are larger than memory. Without it they are kept in memory.

    Raises:
        ValueError: if a pair refers to a trajectory that is not there, is of another start, has no trace, or if a
            segment holds no decision.
    """
    tables = _tables(_rows(trajectories, pairs))
    if file is None:
        return Dataset(pa.concat_tables([PAIR_FEATURES.arrow_schema.empty_table(), *tables]))
    partial = Path(file).with_name(f".partial-{Path(file).name}")
    partial.parent.mkdir(parents=True, exist_ok=True)
    with pa.ipc.new_stream(str(partial), PAIR_FEATURES.arrow_schema) as writer:
        for table in tables:
            writer.write_table(table)
    os.replace(partial, file)
    return Dataset.from_file(str(file))


def check_traces(trajectories: Sequence[Trajectory], policy: VLAPolicy, *, episodes: int = 8) -> None:
    """Refuse rollouts whose traces mean something else to `policy` than what was executed: another checkpoint's bins,
    chunks or statistics. A preference loss would train on them without a word.

    Args:
        trajectories (`Sequence[Trajectory]`): rollouts; the first `episodes` of them are looked at.
        policy ([`VLAPolicy`]): what is to be trained on them.

    Raises:
        ValueError: if a trajectory has no trace, or one of other chunks, or `policy.decode` gives other actions.
    """
    for index in range(min(episodes, len(trajectories))):
        trajectory = trajectories[index]
        if trajectory.trace is None:
            raise ValueError(
                f"`trajectories[{index}]` must have a trace, got None. Use rollouts of a policy, not of an expert."
            )
        taken = trajectory.bounds.diff()
        length = policy.encode(torch.zeros(1, policy.chunk_size, policy.action_dim)).shape[1]
        same = trajectory.trace.shape[1] == length and int(taken.max()) <= policy.chunk_size
        if same:
            chunks = policy.decode(trajectory.trace)
            executed = torch.cat([chunk[:steps] for chunk, steps in zip(chunks, taken, strict=True)])
            same = executed.shape == trajectory.actions.shape and torch.allclose(
                executed, trajectory.actions, rtol=1e-5, atol=1e-6
            )
        if not same:
            raise ValueError(
                f"`trajectories[{index}]` must be a rollout of a policy with the same actions, got traces "
                f"{list(trajectory.trace.shape)} of {trajectory.policy!r} that decode to others. Collect rollouts of the "
                "checkpoint that is trained, or choose its statistics by `unnorm_key`."
            )


def _tables(rows: Iterator[dict[str, Any]]) -> Iterator[pa.Table]:
    """Rows in tables of `ROWS_PER_TABLE`, the last one shorter."""
    while block := list(islice(rows, ROWS_PER_TABLE)):
        yield to_table(block, PAIR_FEATURES)


def _rows(trajectories: Sequence[Trajectory], pairs: Sequence[StagePair]) -> Iterator[dict[str, Any]]:
    episodes = _EncodedEpisodes(trajectories)
    for position, pair in enumerate(pairs):
        row: dict[str, Any] = {
            name: getattr(pair, name) for name in ("task", "instruction", "seed", "stage", "stage_name")
        }
        for side in SIDES:
            trajectory, frames = _find(episodes, pair, side, position)
            start, stop = getattr(pair, f"{side}_start"), getattr(pair, f"{side}_stop")
            decisions = trajectory.decisions_in(start, stop)
            if len(decisions) == 0:
                raise ValueError(
                    f"`pairs` must have a decision on each side, got none on the {side} side of pair {position}."
                )
            row[f"{side}_frames"] = [frames[decision] for decision in decisions.tolist()]
            row[f"{side}_state"] = trajectory.state[decisions].numpy()
            row[f"{side}_trace"] = trajectory.trace[decisions].numpy()
            row[f"{side}_taken"] = _taken(trajectory, decisions, start, stop).numpy()
            row[f"{side}_cost"] = getattr(pair, f"{side}_cost")
        yield row


def _taken(trajectory: Trajectory, decisions: Tensor, start: int, stop: int) -> Tensor:
    """`[M, 2]`: of each decision's chunk the half-open slice that was executed in the environment steps `[start, stop)`.

    Example: decisions begin at steps 0, 4 and 8 of 10; of the slice `[2, 9)` they have `[[2, 4], [0, 4], [0, 1]]`.
    """
    bounds = trajectory.bounds
    first, end = bounds[:-1][decisions], bounds[1:][decisions]
    return torch.stack([first.clamp(min=start), end.clamp(max=stop)], dim=1) - first[:, None]


class _EncodedEpisodes(Sequence[tuple[Trajectory, list[dict[str, Any]]]]):
    """Episodes without images, and their images as PNG. An episode takes part in many pairs: those of its start follow one
    another, those across starts do not, so that as many are kept as fit into `ENCODED_BYTES`."""

    def __init__(self, trajectories: Sequence[Trajectory]):
        self.trajectories = trajectories
        self._kept: OrderedDict[int, tuple[Trajectory, list[dict[str, Any]]]] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        return len(self.trajectories)

    def __getitem__(self, index: int) -> tuple[Trajectory, list[dict[str, Any]]]:
        if index not in self._kept:
            trajectory = self.trajectories[index]
            frames = [image_cell(image) for image in trajectory.images]
            self._kept[index] = replace(trajectory, images=NO_IMAGES), frames
            self._size += _num_bytes(frames)
            while self._size > ENCODED_BYTES and len(self._kept) > 1:
                _, (_, dropped) = self._kept.popitem(last=False)
                self._size -= _num_bytes(dropped)
        self._kept.move_to_end(index)
        return self._kept[index]


def _num_bytes(frames: list[dict[str, Any]]) -> int:
    return sum(len(frame["bytes"]) for frame in frames)


def _find(
    episodes: _EncodedEpisodes, pair: StagePair, side: str, position: int
) -> tuple[Trajectory, list[dict[str, Any]]]:
    index = getattr(pair, side)
    if not 0 <= index < len(episodes):
        raise ValueError(
            f"`pairs` must refer to the {len(episodes)} trajectories, got {index} in pair {position}. "
            f"Load the ones they were built from."
        )
    trajectory, frames = episodes[index]
    found, wanted = (tuple(getattr(thing, name) for name in pair.shared(side)) for thing in (trajectory, pair))
    if found != wanted:
        raise ValueError(
            f"`trajectories[{index}]` must be of {wanted} for pair {position}, got {found}. Load the right ones."
        )
    if trajectory.trace is None:
        raise ValueError(
            f"`trajectories[{index}]` must have a trace, got None. Use rollouts of a policy, not of an expert."
        )
    return trajectory, frames


@dataclass
class PreferenceCollator:
    """Flatten `P` pairs into `S` decisions: all of the chosen segments first, then all of the rejected.

    Args:
        prepare (`Callable`): observations -> model inputs ([`VLAPolicy.prepare`]).
        chunk_size (`int`): `C`, environment steps per decision.

    Returns a dict of:
        - `stages` (`[P]` int64), `stage_names` (list of `P` strings), `chosen_cost`, `rejected_cost` (`[P]` float32),
          `ref_chosen_logps`, `ref_rejected_logps` (`[P]` float32, where the rows have them);
        - `side_ids` (`[S]` int64): whose each decision is, the chosen sides are `0 .. P-1`, the rejected `P .. 2P-1`;
        - `trace` (`[S, L]` int64); `mask` (`[S, L]` bool): its entries that were executed in the segment;
        - `inputs` (dict of `[S, ...]`): what `prepare` made of the observations.

    Example: 2 pairs with 1 and 2 chosen, 2 and 1 rejected decisions have `side_ids = [0, 1, 1, 2, 2, 3]`.
    """

    prepare: Callable[[Observation], dict[str, Tensor]]
    chunk_size: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        images, states, trace, taken, instructions, counts = [], [], [], [], [], []
        for side in SIDES:
            for row in rows:
                counts.append(len(row[f"{side}_frames"]))
                images.extend(torch.from_numpy(np.array(frame)) for frame in row[f"{side}_frames"])
                states.extend(row[f"{side}_state"])
                trace.extend(row[f"{side}_trace"])
                taken.extend(row[f"{side}_taken"])
                instructions.extend([row["instruction"]] * counts[-1])
        tokens = torch.tensor(trace, dtype=torch.int64)
        observation = Observation(torch.stack(images), tuple(instructions), torch.tensor(states, dtype=torch.float32))
        batch = {
            "stages": torch.tensor([row["stage"] for row in rows])
        }  # first: Trainer counts samples by the first tensor
        for name in ("chosen_cost", "rejected_cost", "ref_chosen_logps", "ref_rejected_logps"):
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows], dtype=torch.float32)
        return batch | {
            "stage_names": [row["stage_name"] for row in rows],
            "side_ids": torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)),
            "trace": tokens,
            "mask": self._mask(torch.tensor(taken), tokens.shape[1]),
            "inputs": self.prepare(observation),
        }

    def _mask(self, taken: Tensor, num_tokens: int) -> Tensor:
        """`[S, L]` bool: the tokens of the steps in `taken` `[S, 2]`."""
        step = token_steps(num_tokens, self.chunk_size)
        return (step >= taken[:, :1]) & (step < taken[:, 1:])
