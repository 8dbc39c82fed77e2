"""Dataset cards: what a dataset holds, counted from its files, in the Hub's own format. Works offline."""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import DatasetCard, DatasetCardData
from PIL import Image, ImageDraw
from torch import Tensor

from trl_stare.data.folder import TrajectoryFolder
from trl_stare.data.pairs import OUTCOMES, REASONS
from trl_stare.data.parquet import parquet_files, read_groups
from trl_stare.data.schema import stored_settings

COLUMNS = (
    "task",
    "instruction",
    "policy",
    "seed",
    "success_once",
    "success_at_end",
    "stage_names",
    "stage",
    "segments",
)
"""What is counted, of the columns of a trajectories file."""

TAGS = ("robotics", "vision-language-action", "preference", "trl", "stare")

SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}
"""Rows of the larger configuration, up to -> the Hub's name for it:
https://github.com/huggingface/hub-docs/blob/main/datasetcard.md?plain=1"""

FRAME_WIDTH = 192
CAPTION_HEIGHT = 18


LOADING = """from trl_stare import TokenPolicy

policy = TokenPolicy.from_pretrained({name!r})  # the folder, or its name on the Hub"""
LOADING_ADAPTER = f"""{LOADING}

# This is an adapter: its base must be where adapter_config.json says. A folder of whole weights, for those who do not have it:
from trl_stare.policies import merge_checkpoint

merge_checkpoint({{name!r}})"""


def loading_code(name: str, *, is_adapter: bool = False) -> str:
    """Python lines for a model card.

    Args:
        name (`str`): the checkpoint's folder or Hub id. is_adapter (`bool`): whether it is PEFT's adapter only.
    """
    return (LOADING_ADAPTER if is_adapter else LOADING).format(name=name)


def card_template(name: str) -> str:
    """The text of `hub_cards/{name}`: from the installed package, or from the source checkout this file lies in.

    Raises:
        FileNotFoundError: if it is in neither.
    """
    checkout = Path(__file__).resolve().parents[2] / "hub_cards"
    try:
        folders = [files("trl_stare.hub_cards"), checkout]
    except ModuleNotFoundError:
        folders = [checkout]
    for folder in folders:
        if (template := folder / name).is_file():
            return template.read_text(encoding="utf-8")
    raise FileNotFoundError(
        f"`name` must be a card template, got {name!r}, which is in none of: {', '.join(map(str, folders))}. "
        "Install trl-stare again."
    )


def render_dataset_card(
    repo_id: str,
    trajectories: str | Path,
    preferences: str | Path | None = None,
    *,
    yield_table: Mapping[str, Mapping[str, int]] | None = None,
    picture: str | None = None,
    license: str = "apache-2.0",
) -> str:
    """The `README.md` of a dataset repository. Equal data give equal text.

    Args:
        repo_id (`str`): the repository, `"user/name"`.
        trajectories (`str` or `Path`): folder of [`save_trajectories`]. Images are not read.
        preferences (`str` or `Path`, *optional*): folder of [`save_pairs`].
        yield_table (`Mapping`, *optional*): [`PairSet`]'s, of these pairs.
        picture (`str`, *optional*): path in the repository of [`stage_strip`]'s picture.
        license (`str`): identifier as the Hub lists it.

    Raises:
        FileNotFoundError: if a folder holds no parquet files.
        ValueError: if `yield_table` counts other pairs than `preferences` holds.
    """
    rows = read_rows(trajectories)
    reasons = _count_pairs(preferences) if preferences is not None else None
    if reasons is not None and yield_table is not None:
        _check_yield(yield_table, reasons)
    settings = [note for note in stored_settings(trajectories)[1] if note]
    card = DatasetCard.from_template(
        _card_data(repo_id, max(len(rows), sum(map(sum, (reasons or {}).values()))), preferences is not None, license),
        template_str=card_template("dataset_card.md"),
        repo_id=repo_id,
        name=repo_id.split("/")[-1],
        tasks=_task_rows(rows),
        stages=_stage_rows(rows),
        policies=sorted({row["policy"] for row in rows}),
        num_episodes=len(rows),
        num_starts=len({(row["task"], row["seed"]) for row in rows}),
        reasons=reasons,
        yield_table=yield_table,
        outcomes=OUTCOMES,
        picture=picture,
        settings=[_flatten(note) for note in settings],
        license=license,
    )
    return str(card)


def read_rows(folder: str | Path) -> list[dict[str, Any]]:
    """What the card counts of every episode ([`COLUMNS`]), without its images."""
    tables = (table for file in parquet_files(Path(folder)) for table in read_groups(file, list(COLUMNS)))
    return [row for table in tables for row in table.to_pylist()]


def stage_strip(folder: str | Path) -> bytes:
    """A PNG of the dataset's first episode that came farthest: what was seen as each stage began, and the end."""
    rows = read_rows(folder)
    best = max(range(len(rows)), key=lambda index: (sum(part["passed"] for part in rows[index]["segments"]), -index))
    row, trajectory = rows[best], TrajectoryFolder(folder)[best]
    frames, captions = [], []
    for part in row["segments"]:
        # the last decision that was taken when the stage had not begun later
        decision = int(torch.searchsorted(trajectory.starts, part["start"], right=True)) - 1
        frames.append(trajectory.images[decision])
        captions.append(row["stage_names"][part["stage"]])
    ended = "success" if trajectory.success_once else "not solved"
    return _draw_strip([*frames, trajectory.final_image], [*captions, ended])


def _draw_strip(frames: Sequence[Tensor], captions: Sequence[str]) -> bytes:
    """Frames `[H, W, 3]` uint8 side by side, each over its caption."""
    height = round(FRAME_WIDTH * frames[0].shape[0] / frames[0].shape[1])
    strip = Image.new("RGB", (FRAME_WIDTH * len(frames), height + CAPTION_HEIGHT), "white")
    pen = ImageDraw.Draw(strip)
    for number, (frame, caption) in enumerate(zip(frames, captions, strict=True)):
        strip.paste(Image.fromarray(frame.numpy()).resize((FRAME_WIDTH, height)), (number * FRAME_WIDTH, 0))
        pen.text((number * FRAME_WIDTH + 4, height + 3), caption, fill="black")
    buffer = io.BytesIO()
    strip.save(buffer, format="PNG")
    return buffer.getvalue()


def _card_data(repo_id: str, num_rows: int, has_pairs: bool, license: str) -> DatasetCardData:
    """The metadata. `configs` is what the viewer and `load_dataset(repo_id, "trajectories")` go by:
    https://huggingface.co/docs/hub/datasets-manual-configuration."""
    names = ["trajectories", "preferences"] if has_pairs else ["trajectories"]
    configs = [
        {"config_name": name, "data_files": [{"split": "train", "path": f"{name}/*.parquet"}]} for name in names
    ]
    configs[0]["default"] = True
    return DatasetCardData(
        license=license,
        pretty_name=repo_id.split("/")[-1],
        task_categories=["robotics"],
        size_categories=[next((name for limit, name in SIZES.items() if num_rows < limit), "n>1M")],
        tags=list(TAGS),
        configs=configs,
    )


def _task_rows(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A line per task and instruction."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["task"], row["instruction"]].append(row)
    return [
        {
            "task": task,
            "instruction": instruction,
            "episodes": len(members),
            "starts": len({row["seed"] for row in members}),
            "steps": sum(len(row["stage"]) for row in members),
            "success_once": sum(row["success_once"] for row in members),
            "success_at_end": sum(row["success_at_end"] for row in members),
        }
        for (task, instruction), members in groups.items()
    ]


def _stage_rows(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A line per task and stage: episodes that reached it, that passed it, mean steps in it and mean cost of it."""
    parts: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        for name in row["stage_names"]:
            parts.setdefault((row["task"], name), [])
        for part in row["segments"]:
            parts[row["task"], row["stage_names"][part["stage"]]].append(part)
    return [
        {
            "task": task,
            "stage": name,
            "reached": len(members),
            "passed": sum(part["passed"] for part in members),
            "steps": _mean([part["stop"] - part["start"] for part in members]),
            "cost": _mean([part["cost"] for part in members]),
        }
        for (task, name), members in parts.items()
    ]


def _count_pairs(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Stage name, in the order of the stages -> pairs with each of [`REASONS`]."""
    counts: Counter[tuple[int, str, str]] = Counter()
    for file in parquet_files(Path(folder)):
        for table in read_groups(file, ["stage", "stage_name", "reason"]):
            counts.update(tuple(row.values()) for row in table.select(["stage", "stage_name", "reason"]).to_pylist())
    stages = sorted({(stage, name) for stage, name, _ in counts})
    return {name: tuple(counts[stage, name, reason] for reason in REASONS) for stage, name in stages}


def _check_yield(yield_table: Mapping[str, Mapping[str, int]], reasons: Mapping[str, tuple[int, ...]]) -> None:
    # tables from before there was `fill` do not count it
    counted = {stage: counts["made"] + counts.get("filled", 0) for stage, counts in yield_table.items()}
    told = {stage: count for stage, count in counted.items() if count}
    held = {stage: sum(counts) for stage, counts in reasons.items()}
    if told != held:
        raise ValueError(
            f"`yield_table` must count the pairs that `preferences` holds, {held}, got {told}. Make the pairs again."
        )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _flatten(note: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"versions": {"sapien": "3"}}` -> `{"versions.sapien": "3"}`, in the order of the names."""
    flat: dict[str, Any] = {}
    for name, value in sorted(note.items()):
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
