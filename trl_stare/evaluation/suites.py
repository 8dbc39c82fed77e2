"""Which episodes an evaluation plays: suites of tasks, and held-out starts."""

from __future__ import annotations

import re
from collections.abc import Mapping

from trl_stare.names import nearest_hint

SUITES: dict[str, tuple[str, ...]] = {
    "simpler_widowx": (
        "PutCarrotOnPlateInScene-v1",
        "PutSpoonOnTableClothInScene-v1",
        "StackGreenCubeOnYellowCubeBakedTexInScene-v1",
        "PutEggplantInBasketScene-v1",
    ),
    "maniskill_panda": (
        "PushCube-v1",
        "PullCube-v1",
        "PickCube-v1",
        "StackCube-v1",
        "PlaceSphere-v1",
        "LiftPegUpright-v1",
        "PegInsertionSide-v1",
    ),
}
"""Name -> tasks. `simpler_widowx` is SimplerEnv's Bridge suite (arXiv 2405.05941)."""

HELD_OUT = range(50_000)
"""Seeds that the recipes never train on: videos begin at 50,000, demonstrations at 100,000. Of a task with a list of configurations
training meets the same ones nevertheless."""

DEFAULT_EPISODES = 100
"""Of a task without a list of configurations. The Wilson interval is then at most 19 points wide."""


def suite_tasks(suite: str) -> tuple[str, ...]:
    """The tasks of a named suite, or of a comma list.

    Raises:
        ValueError: if the list is empty or repeats a task, or is one name that is nearly a suite's.

    Example: `suite_tasks("PushCube-v1,PullCube-v1")` is `("PushCube-v1", "PullCube-v1")`.
    """
    if suite in SUITES:
        return SUITES[suite]
    tasks = tuple(re.split(r"\s*,\s*", suite.strip()))
    misspelt = nearest_hint(suite, SUITES) if len(tasks) == 1 else ""
    if not all(tasks) or len(set(tasks)) != len(tasks) or misspelt:
        raise ValueError(
            f"`suite` must be one of {sorted(SUITES)} or a comma list of different tasks, got {suite!r}.{misspelt}"
        )
    return tasks


def held_out_starts(seed: int, episodes: int | None, configurations: int) -> range:
    """Seeds of the episodes of one evaluation seed: `episodes` many, which no other evaluation seed plays. Where a task has a list of
    configurations, seeds that are equal modulo its length begin alike.

    Args:
        seed (`int`): the evaluation's seed, counted from 0.
        episodes (`int`, *optional*): by default every initial configuration once, or `DEFAULT_EPISODES` where there is no list.
        configurations (`int`): initial configurations of the task, 0 if the seed draws the start.

    Raises:
        ValueError: if there is no episode, or the seeds are not all among `HELD_OUT`.

    Example: `held_out_starts(1, None, 24)` is `range(24, 48)`: each of the 24 configurations once, as `24 % 24` is 0.
    """
    count = episodes if episodes is not None else configurations or DEFAULT_EPISODES
    starts = range(seed * count, (seed + 1) * count)
    if count < 1 or starts.start not in HELD_OUT or starts[-1] not in HELD_OUT:
        raise ValueError(
            f"`seed` and `episodes` must give at least one episode among the held-out seeds 0 to {HELD_OUT[-1]}, got {starts}."
        )
    return starts


def check_distinct(starts: Mapping[int, range], configurations: int, task: str) -> None:
    """Refuse episodes that are played twice, where the start alone decides how they go: a greedy policy's, a demonstrator's.

    The simulator repeats such an episode exactly. Counted several times it would make intervals narrower and p values smaller
    without telling anything new.

    Args:
        starts (`Mapping`): evaluation seed -> [`held_out_starts`]. configurations (`int`): of the task, 0 if the seed draws the start.
        task (`str`): its name.

    Raises:
        ValueError: if two episodes are of one configuration.

    Example: where there are 24 configurations, two seeds of 24 episodes each are refused, and so are seeds 0 and 2 of twelve each, since
    24 is configuration 0 again; seeds 0 and 1 of twelve each are not.
    """
    episodes = sum(map(len, starts.values()))
    if not configurations:
        return
    distinct = {start % configurations for chosen in starts.values() for start in chosen}
    if len(distinct) < episodes:
        raise ValueError(
            f"`episodes` and `seed` must give each of the {configurations} configurations of {task} at most once where nothing is drawn, "
            f"got {episodes} episodes of {len(distinct)}: the others would be repetitions. Leave out `episodes` and give one `seed`, or "
            "sample with a `temperature` above 0."
        )
