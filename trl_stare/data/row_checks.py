"""What a row of trajectories or of preferences must satisfy by itself; [`validate_dataset`] looks at whole datasets."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trl_stare.data.pairs import ACROSS, WHOLE_TRAJECTORY, StagePair, num_passed
from trl_stare.data.schema import SIGNAL_PREFIX
from trl_stare.stages import Segment

PER_STEP = ("labels", "reward", "stage")
PER_DECISION = ("images", "state", "trace", "logps")
MAY_BE_NULL = ("trace", "logps")


class Episode(NamedTuple):
    """What pairs refer to: a valid row of trajectories without its tensors."""

    task: str
    instruction: str
    seed: int
    num_steps: int
    stage_names: tuple[str, ...]
    segments: tuple[Segment, ...]
    success: bool


def same_cost(a: float, b: float) -> bool:
    """Whether two costs are equal but for rounding: another machine computes their last digits otherwise."""
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)


def episode_of(cells: Mapping[str, Any]) -> Episode:
    """The facts of a row in which [`episode_problems`] found none."""
    return Episode(
        task=cells["task"],
        instruction=cells["instruction"],
        seed=cells["seed"],
        num_steps=len(cells["actions"]),
        stage_names=tuple(cells["stage_names"]),
        segments=tuple(Segment(**part) for part in cells["segments"]),
        success=cells["success_once"],
    )


def episode_problems(cells: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a row of trajectories, a sentence each.

    Args:
        cells (`Mapping[str, Any]`): the row's cells by column: lists of numbers and images as tensors, the rest as Python
            values.
    """
    nulls = [name for name, value in cells.items() if value is None and name not in MAY_BE_NULL]
    if nulls:
        yield f"columns {nulls} must not be null"
        return
    # nothing else can be looked up in an episode whose parts do not fit each other
    lengths = [*_length_problems(cells)]
    yield from lengths
    yield from _number_problems(cells)
    if not lengths:
        yield from _time_problems(cells)
        yield from _segment_problems(cells)
        yield from _outcome_problems(cells)


def layout_of(cells: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of a step, a decision, a signal's value: what all episodes of a task have in common."""
    tensors = {name: value for name, value in cells.items() if isinstance(value, Tensor)}
    return {
        name: tuple(value.shape if name in ("final_image", "final_state") else value.shape[1:])
        for name, value in tensors.items()
    }


def _length_problems(cells: Mapping[str, Any]) -> Iterator[str]:
    steps, decisions = len(cells["actions"]), len(cells["starts"])
    if not steps or not decisions:
        yield f"must hold steps and decisions, got {steps} `actions` and {decisions} `starts`"
    wanted = dict.fromkeys(PER_STEP, steps) | dict.fromkeys(PER_DECISION, decisions)
    wanted |= {name: steps + 1 for name in cells if name.startswith(SIGNAL_PREFIX)}
    for name, length in wanted.items():
        if cells[name] is not None and len(cells[name]) != length:
            yield f"`{name}` must have length {length}, got {len(cells[name])}"
    same = [("labels", "actions"), ("final_state", "state"), ("final_image", "images")]
    if cells["trace"] is not None and cells["logps"] is not None and not _is_recorded(cells):
        same.append(("logps", "trace"))
    for one, other in same:
        widths = [tuple(cells[name].shape[0 if name.startswith("final") else 1 :]) for name in (one, other)]
        if widths[0] != widths[1]:
            yield f"`{one}` must have the shape of `{other}`, got {widths[0]} for {widths[1]}"


def _is_recorded(cells: Mapping[str, Any]) -> bool:
    """Whether `trace` is a flow policy's: per environment step one log-probability a dimension, and a longer record of the chain."""
    trace, logps, action_dim = (cells[name].shape[-1] for name in ("trace", "logps", "actions"))
    return trace > logps > 0 and logps % action_dim == 0 and trace % (logps // action_dim) == 0


def _number_problems(cells: Mapping[str, Any]) -> Iterator[str]:
    for name, value in cells.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            bad = torch.nonzero(~torch.isfinite(value))
            if len(bad):
                yield f"`{name}` must be finite, got {value[tuple(bad[0])].item()} at {bad[0].tolist()}"
    if cells["trace"] is not None and (cells["trace"] < 0).any():
        yield f"`trace` must be >= 0, got {int(cells['trace'].min())}"
    if cells["seed"] < 0:
        yield f"`seed` must be >= 0, got {cells['seed']}"
    for name in ("task", "instruction", "policy"):
        if not cells[name]:
            yield f"`{name}` must not be empty"


def _time_problems(cells: Mapping[str, Any]) -> Iterator[str]:
    starts, stages, names = cells["starts"], cells["stage"], cells["stage_names"]
    if int(starts[0]) != 0 or (starts.diff() <= 0).any() or int(starts[-1]) >= len(cells["actions"]):
        yield f"`starts` must rise from 0 to less than {len(cells['actions'])}, got {starts.tolist()}"
    if not names or not all(names) or len(set(names)) < len(names):
        yield f"`stage_names` must be different names, got {names}"
    wrong = stages[(stages < 0) | (stages > len(names))]
    if len(wrong):
        yield f"`stage` must be in [0, {len(names)}], got {sorted(set(wrong.tolist()))}"


def _segment_problems(cells: Mapping[str, Any]) -> Iterator[str]:
    """Latched stages: contiguous from stage 0 and step 0, all but the last passed."""
    steps, num_stages, end, segments = len(cells["actions"]), len(cells["stage_names"]), 0, cells["segments"]
    if not segments:
        yield "`segments` must hold the first stage, got none"
    for position, part in enumerate(segments):
        if part is None or None in part.values():
            yield f"segment {position} must hold no nulls, got {part}"
            return
        stage, start, stop, passed, cost = (part[name] for name in Segment._fields)
        last = position + 1 == len(segments)
        if stage != position or stage >= num_stages:
            yield f"segment {position} must be of stage {position} of {num_stages}, got {stage}"
        if start != end:
            yield f"segment {position} must begin at step {end}, got {'a gap' if start > end else 'an overlap'} at {start}"
        if not start <= stop <= steps:
            yield f"segment {position} must end in [{start}, {steps}], got {stop}"
        if not passed and (not last or stop != steps):
            yield f"segment {position} must be passed or last until step {steps}, got neither"
        if passed and last and position + 1 < num_stages:
            yield f"segment {position} is passed, so stage {position + 1} must follow, got none"
        if not (math.isfinite(cost) and cost >= 0) or (start == stop and cost != 0):
            yield f"segment {position} must cost a finite number >= 0, and 0 if it is empty, got {cost}"
        end = stop


def _outcome_problems(cells: Mapping[str, Any]) -> Iterator[str]:
    success = cells[SIGNAL_PREFIX + "success"]
    found = cells["success_once"], cells["success_at_end"]
    wanted = bool(success[1:].any()), bool(success[-1])
    if found != wanted:
        yield f"`success_once`, `success_at_end` must agree with the signal `success`, {wanted}, got {found}"
    if cells["terminated"] and cells["truncated"]:
        yield "`terminated` and `truncated` must not both be true"
    if (cells["stage"][success[:-1]] != len(cells["stage_names"])).any():
        yield f"`stage` must be {len(cells['stage_names'])} wherever the task is solved"
    if success.any():
        first, end = int(success.long().argmax()), (cells["segments"] or [{"stop": None}])[-1]
        passed = len(cells["segments"]) == len(cells["stage_names"]) and end["passed"]
        if not passed or end["stop"] is None or end["stop"] > first:
            yield f"`segments` must all be passed by the first success, step {first}"
    try:
        note = json.loads(cells["metadata"])
    except json.JSONDecodeError as error:
        note = error
    if not isinstance(note, dict):
        yield f"`metadata` must be a JSON object, got {note!r}"


def pair_problems(row: Mapping[str, Any], episodes: Mapping[int, Episode | None] | None) -> Iterator[str]:
    """What is wrong with a row of preferences, a sentence each.

    Args:
        row (`Mapping[str, Any]`): the row.
        episodes (`Mapping[int, Episode | None]`, *optional*): the trajectories by `id`, `None` for one that is invalid
            itself; without them the row is looked at alone.
    """
    nulls = [name for name, value in row.items() if value is None]
    if nulls:
        yield f"columns {nulls} must not be null"
        return
    pair = StagePair(**{name: row[name] for name in StagePair.__dataclass_fields__})
    if pair.chosen == pair.rejected:
        yield f"`chosen` and `rejected` must differ, got {pair.chosen} for both"
    recorded, passed = [], []
    for side in ("chosen", "rejected"):
        index = getattr(pair, side)
        episode = None if episodes is None else episodes.get(index)
        if episodes is not None and index not in episodes:
            yield f"`{side}` must be one of the {len(episodes)} trajectories, got {index}"
        if episode is not None:
            recorded.append(_recorded(pair, episode))
            passed.append(num_passed(episode.segments))
            yield from _start_problems(pair, side, episode)
            yield from _slice_problems(pair, side, episode, recorded[-1])
    if len(recorded) == 2 and None not in recorded:
        yield from _reason_problems(pair, *recorded, *passed)


def _recorded(pair: StagePair, episode: Episode) -> Segment | None:
    """The segment of the pair's stage as the trajectory has it, `None` if it did not get there."""
    if pair.stage_name == WHOLE_TRAJECTORY:
        return Segment(0, 0, episode.num_steps, episode.success, 0.0) if pair.stage == 0 else None
    return episode.segments[pair.stage] if 0 <= pair.stage < len(episode.segments) else None


def _start_problems(pair: StagePair, side: str, episode: Episode) -> Iterator[str]:
    shared = pair.shared(side)
    if "seed" not in shared and pair.seed == episode.seed:
        yield f"`reason` must be 'passed' where both began at seed {pair.seed}, got {pair.reason!r}"
    for name in shared:
        found, wanted = getattr(pair, name), getattr(episode, name)
        if found != wanted:
            yield f"`{name}` must be that of the {side} trajectory, {wanted!r}, got {found!r}"
    stages = {WHOLE_TRAJECTORY: 0} | {name: stage for stage, name in enumerate(episode.stage_names)}
    if stages.get(pair.stage_name) != pair.stage:
        yield f"`stage_name` and `stage` must be one of {stages}, got {pair.stage_name!r} and {pair.stage}"


def _slice_problems(pair: StagePair, side: str, episode: Episode, recorded: Segment | None) -> Iterator[str]:
    start, stop, cost = (getattr(pair, f"{side}_{name}") for name in ("start", "stop", "cost"))
    columns, found = f"`{side}_start` and `{side}_stop`", f"[{start}, {stop})"
    if not 0 <= start <= stop <= episode.num_steps:
        yield f"{columns} must lie in [0, {episode.num_steps}], got {found}"
    elif start == stop:
        yield f"{columns} must not be empty, got {found}"
    if recorded is None:
        yield f"stage {pair.stage} must have been reached by the {side} trajectory"
        return
    if (recorded.start, recorded.stop) != (start, stop):
        yield f"{columns} must be the trajectory's segment [{recorded.start}, {recorded.stop}), got {found}"
    if not same_cost(recorded.cost, cost):
        yield f"`{side}_cost` must be the segment's, {recorded.cost}, got {cost}"


def _reason_problems(
    pair: StagePair, chosen: Segment, rejected: Segment, chosen_passed: int, rejected_passed: int
) -> Iterator[str]:
    if not chosen.passed:
        yield "the chosen side must have passed the stage"
    wanted = ("cost", "later") if rejected.passed else ("passed", ACROSS)
    if pair.reason not in wanted:
        yield f"`reason` must be {' or '.join(map(repr, wanted))}, got {pair.reason!r}"
    elif pair.reason == "later" and not chosen_passed > rejected_passed:
        yield f"the chosen trajectory must have passed more stages than the rejected one, got {chosen_passed} and {rejected_passed}"
    elif pair.reason == "cost" and not pair.chosen_cost < pair.rejected_cost:
        yield f"`chosen_cost` must be below `rejected_cost`, got {pair.chosen_cost} and {pair.rejected_cost}"
