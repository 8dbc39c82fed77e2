"""Every corruption of a valid dataset is found, all of them at once, with file and row."""

import math
import pickle
import random
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_stare.data.pairs import build_pairs
from trl_stare.data.schema import load_trajectories, save_pairs, save_trajectories
from trl_stare.data.validate import InvalidDatasetError, validate_dataset
from trl_stare.stages import get_plan

PLAN = get_plan("StackCube-v1")
NUM_EPISODES, FILE = 6, "train-00000-of-00001.parquet"


@pytest.fixture(scope="module")
def valid(tmp_path_factory, episode):
    """Folders of a valid dataset, and the tables in them."""
    folder = tmp_path_factory.mktemp("valid")
    episodes = [
        replace(episode(seed, num_steps=9 + seed % 3, success_at=8 if seed % 2 else None), seed=seed // 2)
        for seed in range(NUM_EPISODES)
    ]
    save_trajectories(episodes, folder / "trajectories", PLAN, metadata={"visuals": "light"})
    save_pairs(build_pairs(episodes, PLAN, min_cost_gap=0.0).pairs, folder / "pairs")
    return {name: (folder / name, pq.read_table(folder / name / FILE)) for name in ("trajectories", "pairs")}


def rewrite(folder, table, **options):
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / FILE, row_group_size=4, write_page_checksum=True, **options)
    return folder


def with_cell(table, row, column, value):
    """`table` with one cell replaced, or changed where `value` is a function."""
    cells = table[column].to_pylist()
    cells[row] = value(cells[row]) if callable(value) else value
    field = table.schema.field(column)
    return table.set_column(table.schema.get_field_index(column), field, pa.array(cells, type=field.type))


def problems_of(tmp_path, valid, *, trajectories=None, pairs=None):
    """What is found when one of the tables, or both, are others."""
    folders = [
        valid[name][0] if table is None else rewrite(tmp_path / name, table)
        for name, table in (("trajectories", trajectories), ("pairs", pairs))
    ]
    with pytest.raises(InvalidDatasetError) as caught:
        validate_dataset(*folders)
    return caught.value.problems


def test_a_valid_dataset_passes(valid):
    validate_dataset(valid["trajectories"][0])
    validate_dataset(valid["trajectories"][0], valid["pairs"][0])
    assert len(valid["pairs"][1]) >= 5


def test_an_empty_folder_is_named(tmp_path, valid):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        validate_dataset(valid["trajectories"][0], tmp_path / "nowhere")


def swap(one, other):
    return lambda values: [values[{one: other, other: one}.get(i, i)] for i in range(len(values))]


def change(position, value):
    """The list with another item, or with other entries in the struct that is there."""

    def changed(values):
        item = values[position] | value if isinstance(value, dict) else value
        position_ = position % len(values)
        return [*values[:position_], item, *values[position_ + 1 :]]

    return changed


# row 1 has 10 steps, decisions at 0, 4, 8, success at 8; segments [0, 2) [2, 8) [8, 8) [8, 8)
WRONG_ROWS = [
    ("stage", change(0, 5), "`stage` must be in [0, 4], got [5]"),
    ("stage", change(0, -1), "`stage` must be in [0, 4], got [-1]"),
    ("stage", change(8, 3), "`stage` must be 4 wherever the task is solved"),
    ("stage", lambda stages: stages[:-1], "`stage` must have length 10, got 9"),
    ("segments", change(1, {"start": 3}), "segment 1 must begin at step 2, got a gap at 3"),
    ("segments", change(1, {"start": 1}), "segment 1 must begin at step 2, got an overlap at 1"),
    ("segments", change(1, {"stop": 11}), "segment 1 must end in [2, 10], got 11"),
    ("segments", change(0, {"passed": False}), "segment 0 must be passed or last until step 10, got neither"),
    ("segments", change(2, {"stage": 3}), "segment 2 must be of stage 2 of 4, got 3"),
    ("segments", change(0, {"cost": math.nan}), "segment 0 must cost a finite number >= 0, and 0 if it is empty, got nan"),
    ("segments", change(0, {"cost": None}), "segment 0 must hold no nulls"),
    ("segments", lambda parts: parts[:2], "segment 1 is passed, so stage 2 must follow, got none"),
    ("segments", [], "`segments` must hold the first stage, got none"),
    ("starts", swap(0, 1), "`starts` must rise from 0 to less than 10, got [4, 0, 8]"),
    ("starts", change(2, 10), "`starts` must rise from 0 to less than 10, got [0, 4, 10]"),
    ("actions", change(3, [math.inf] * 7), "`actions` must be finite, got inf at [3, 0]"),
    ("actions", change(3, [0.0] * 6), "column 'actions' cannot be read: rows must have one length"),
    ("actions", [], "must hold steps and decisions, got 0 `actions` and 3 `starts`"),
    ("labels", lambda rows: [row[:-1] for row in rows], "`labels` must have the shape of `actions`, got (6,) for (7,)"),
    ("reward", change(0, None), "column 'reward' cannot be read: must have no nulls, got 1"),
    ("state", change(0, [math.nan] * 5), "`state` must be finite, got nan at [0, 0]"),
    ("state", lambda rows: rows[1:], "`state` must have length 3, got 2"),
    ("final_state", [0.0], "`final_state` must have the shape of `state`, got (1,) for (5,)"),
    ("logps", change(2, [-math.inf] * 28), "`logps` must be finite, got -inf at [2, 0]"),
    ("trace", change(0, [-1] * 28), "`trace` must be >= 0, got -1"),
    ("trace", lambda rows: [row[:-1] for row in rows], "`logps` must have the shape of `trace`, got (28,) for (27,)"),
    ("images", lambda images: images[:-1], "`images` must have length 3, got 2"),
    ("images", change(1, None), "column 'images' cannot be read"),
    ("final_image", {"bytes": b"", "path": None}, "column 'final_image' cannot be read: cannot identify image"),
    ("signal.tcp_position", change(10, [math.nan] * 3), "`signal.tcp_position` must be finite, got nan at [10, 0]"),
    ("signal.is_contact", lambda values: values[1:], "`signal.is_contact` must have length 11, got 10"),
    ("signal.success", lambda values: [False] * 11, "must agree with the signal `success`, (False, False), got (True, True)"),
    ("signal.success", change(7, True), "`segments` must all be passed by the first success, step 7"),
    ("truncated", True, "`terminated` and `truncated` must not both be true"),
    ("stage_names", ["Reach", "Reach", "Transport", "Stack"], "`stage_names` must be different names"),
    ("metadata", "[1]", "`metadata` must be a JSON object, got [1]"),
    ("metadata", "{", "`metadata` must be a JSON object, got JSONDecodeError"),
    ("id", 0, "`id` must be the row's number in the dataset, 1, got 0"),
    ("seed", -3, "`seed` must be >= 0, got -3"),
    ("task", "", "`task` must not be empty"),
    ("instruction", None, "columns ['instruction'] must not be null"),
]  # fmt: skip


@pytest.mark.parametrize(("column", "value", "message"), WRONG_ROWS, ids=[case[2] for case in WRONG_ROWS])
def test_a_wrong_episode_is_told_with_its_row(tmp_path, valid, column, value, message):
    table = with_cell(valid["trajectories"][1], 1, column, value)
    problems = problems_of(tmp_path, valid, trajectories=table)
    assert any(f"{FILE}`, row 1" in problem and message in problem for problem in problems), problems
    assert all("row 1" in problem or "pairs" in problem for problem in problems)


WRONG_PAIRS = [
    ({"chosen": 6}, "`chosen` must be one of the 6 trajectories, got 6"),
    ({"rejected": -1}, "`rejected` must be one of the 6 trajectories, got -1"),
    ({"rejected": 1}, "`chosen` and `rejected` must differ, got 1 for both"),
    ({"rejected": 2}, "`seed` must be that of the rejected trajectory, 1, got 0"),
    ({"instruction": "stack the blue cube"}, "`instruction` must be that of the chosen trajectory, 'stack the red cube'"),
    ({"task": "PickCube-v1"}, "`task` must be that of the chosen trajectory, 'StackCube-v1'"),
    ({"chosen_start": 8}, "`chosen_start` and `chosen_stop` must not be empty, got [8, 8)"),
    ({"chosen_stop": 11}, "`chosen_start` and `chosen_stop` must lie in [0, 10], got [2, 11)"),
    ({"chosen_stop": 7}, "`chosen_start` and `chosen_stop` must be the trajectory's segment [2, 8), got [2, 7)"),
    ({"chosen_cost": math.nan}, "`chosen_cost` must be the segment's"),
    ({"rejected_cost": math.inf}, "`rejected_cost` must be the segment's"),
    ({"reason": "cost"}, "`reason` must be 'passed' or 'across', got 'cost'"),
    ({"stage": 0}, "`stage_name` and `stage` must be one of {'trajectory': 0, 'Reach': 0, 'Grasp': 1"),
    ({"stage": 2, "stage_name": "Transport"}, "stage 2 must have been reached by the rejected trajectory"),
    ({"stage": None}, "columns ['stage'] must not be null"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), WRONG_PAIRS, ids=[case[1] for case in WRONG_PAIRS])
def test_a_wrong_pair_is_told_with_its_row(tmp_path, valid, change, message):
    rows = valid["pairs"][1].to_pylist()
    position = next(i for i, row in enumerate(rows) if row["stage_name"] == "Grasp" and row["chosen"] == 1)
    rows[position] |= change
    table = pa.Table.from_pylist(rows, schema=valid["pairs"][1].schema)
    problems = problems_of(tmp_path, valid, pairs=table)
    assert any(f"row {position}: " in problem and message in problem for problem in problems), problems


def test_a_pair_the_other_way_round(tmp_path, valid):
    row = valid["pairs"][1].to_pylist()[0]
    sides = ("chosen", "rejected")
    turned = {key.replace(*sides) if key.startswith("chosen") else key.replace(*sides[::-1]): row[key] for key in row}
    table = pa.Table.from_pylist([row, turned], schema=valid["pairs"][1].schema)
    problems = problems_of(tmp_path, valid, pairs=table)
    assert any("row 1: these two were compared in this stage before" in problem for problem in problems)


def test_a_pair_that_looks_ahead(tmp_path, valid):
    trajectories = valid["trajectories"][0]
    pairs = build_pairs(load_trajectories(trajectories), PLAN, both_passed="later").pairs
    save_pairs(pairs, tmp_path / "right")
    validate_dataset(trajectories, tmp_path / "right")
    pair = next(pair for pair in pairs if pair.reason == "later")
    sides = (
        "chosen",
        "rejected",
        "chosen_start",
        "rejected_start",
        "chosen_stop",
        "rejected_stop",
        "chosen_cost",
        "rejected_cost",
    )
    turned = {
        name: getattr(pair, other)
        for a, b in zip(sides[::2], sides[1::2], strict=True)
        for name, other in ((a, b), (b, a))
    }
    save_pairs([replace(pair, **turned)], tmp_path / "wrong")
    with pytest.raises(InvalidDatasetError, match="must have passed more stages than the rejected one, got 1 and 4"):
        validate_dataset(trajectories, tmp_path / "wrong")


def test_a_pair_across_starts(tmp_path, valid):
    """Valid as it is made; another reason, or one start, is an error."""
    folder = valid["trajectories"][0]
    episodes = load_trajectories(folder)
    moved = [replace(episode, seed=episode.seed + index) for index, episode in enumerate(episodes)]
    save_trajectories(moved, tmp_path / "moved", PLAN, metadata={})
    pairs = build_pairs(moved, PLAN).pairs
    assert pairs == (), "no two of one start"
    near = next(pair for pair in build_pairs(episodes, PLAN).pairs if pair.reason == "passed")
    across = replace(near, reason="across", seed=moved[near.chosen].seed)
    save_pairs([across], tmp_path / "right")
    validate_dataset(tmp_path / "moved", tmp_path / "right")
    save_pairs([replace(across, reason="passed")], tmp_path / "named")
    with pytest.raises(InvalidDatasetError, match="`seed` must be that of the rejected trajectory"):
        validate_dataset(tmp_path / "moved", tmp_path / "named")
    save_pairs([replace(near, reason="across")], tmp_path / "same")
    with pytest.raises(InvalidDatasetError, match="`reason` must be 'passed' where both began at seed"):
        validate_dataset(folder, tmp_path / "same")


def test_all_problems_of_all_rows_and_files_are_in_one_error(tmp_path, valid):
    trajectories, pairs = (valid[name][1] for name in ("trajectories", "pairs"))
    trajectories = with_cell(with_cell(trajectories, 0, "stage", change(0, 9)), 4, "state", change(0, [math.nan] * 5))
    pairs = with_cell(with_cell(pairs, 0, "chosen", 77), 2, "reason", "taste")
    problems = problems_of(tmp_path, valid, trajectories=trajectories, pairs=pairs)
    for part in ("row 0: `stage`", "row 4: `state`", "row 0: `chosen` must be one of", "row 2: `reason`"):
        assert any(part in problem for problem in problems), (part, problems)
    with pytest.raises(ValueError, match=f"got {len(problems)}:\n- "):
        raise InvalidDatasetError(problems)


def test_a_long_list_is_cut_in_the_text_only():
    error = InvalidDatasetError([f"row {row}" for row in range(60)])
    assert len(error.problems) == 60 and "row 49\n- and 10 more" in str(error) and "row 50" not in str(error)


def test_the_error_comes_whole_from_another_process():
    error = InvalidDatasetError([f"row {row}" for row in range(60)])
    copied = pickle.loads(pickle.dumps(error))
    assert (copied.problems, str(copied)) == (error.problems, str(error))


def test_columns_of_every_file(tmp_path, valid):
    good = valid["trajectories"][1]
    seeds = good.set_column(good.column_names.index("seed"), "seed", pa.array(["0"] * NUM_EPISODES))
    wrong = seeds.drop_columns(["actions", "signal.success"]).append_column("mood", pa.array([1.0] * NUM_EPISODES))
    folder = rewrite(tmp_path / "trajectories", wrong)
    pq.write_table(good.drop_columns(["labels"]), folder / "train-00001.parquet")
    with pytest.raises(InvalidDatasetError) as caught:
        validate_dataset(folder, valid["pairs"][0])
    expected = ["'seed' must be Value('int64')", "'actions'", "'signal.success'", "'mood' is unknown", "'labels'"]
    for part in expected:
        assert any(part in problem for problem in caught.value.problems), part
    assert sum("train-00001" in problem for problem in caught.value.problems) == 1
    assert "they were looked at alone" in caught.value.problems[-1]


def test_an_episode_of_another_size(tmp_path, valid):
    table = with_cell(valid["trajectories"][1], 2, "actions", lambda rows: [row[:4] for row in rows])
    table = with_cell(table, 2, "labels", lambda rows: [row[:4] for row in rows])
    problems = problems_of(tmp_path, valid, trajectories=table)
    assert any("row 2: `actions` must be shaped as in the task's first episode, (7,), got (4,)" in p for p in problems)


def test_damaged_files_are_named_with_row_group_and_rows(tmp_path, valid):
    folder = rewrite(tmp_path / "damaged", valid["trajectories"][1])
    file = folder / FILE
    data = bytearray(file.read_bytes())
    pages = pq.read_metadata(file).row_group(1).column(valid["trajectories"][1].column_names.index("task"))
    data[pages.data_page_offset + pages.total_compressed_size // 2] ^= 1
    file.write_bytes(data)
    file.with_name("train-00001.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(InvalidDatasetError) as caught:
        validate_dataset(folder)
    group, truncated = caught.value.problems
    assert f"{FILE}`, row group 1 is damaged" in group and group.endswith("(rows 4 to 5)")
    assert "train-00001.parquet` must be a parquet file" in truncated


def corrupted(draw, table):
    """A change after which the table is no valid dataset any more, whatever cell it hits, and what was done."""
    row = draw(st.integers(0, len(table) - 1))
    column = draw(st.sampled_from([name for name in table.column_names if name not in ("policy", "trace", "logps")]))
    cell = table[column][row].as_py()
    kinds = ["null", "drop", "rename", "retype"]
    if isinstance(cell, list):
        kinds += ["longer", "shorter", "null item"]
    if column in ("state", "actions", "labels", "reward", "logps") or (
        column.startswith("signal.") and isinstance(cell[0], (float, list))
    ):
        kinds += ["not finite"]
    if column in ("id", "chosen", "rejected", "starts", "stage"):
        kinds += ["out of range"]
    kind = draw(st.sampled_from(kinds))
    if kind == "drop":
        return table.drop_columns([column]), (kind, column)
    if kind == "rename":
        return table.rename_columns({column: f"{column}s"}), (kind, column)
    if kind == "retype":
        wrong = pa.array([b"?"] * len(table))
        return table.set_column(table.column_names.index(column), column, wrong), (kind, column)
    item = draw(st.integers(0, len(cell) - 1)) if isinstance(cell, list) else None
    bad = draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    far = draw(st.sampled_from([-(2**40), -1, 1000, 2**40]))
    nested = isinstance(cell, list) and isinstance(cell[item], list)
    value = {
        "null": lambda: None,
        "longer": lambda: [*cell, cell[-1]],
        "shorter": lambda: cell[:-1],
        "null item": lambda: change(item, None)(cell),
        "not finite": lambda: change(item, [bad] * len(cell[item]) if nested else bad)(cell),
        "out of range": lambda: far if item is None else change(item, far)(cell),
    }[kind]()
    return with_cell(table, row, column, value), (kind, column, row, item)


def find_corruptions(tmp_path_factory, valid, *, examples):
    @given(st.data())
    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    def check(data):
        name = data.draw(st.sampled_from(["trajectories", "trajectories", "pairs"]))
        table, what = corrupted(data.draw, valid[name][1])
        try:
            problems_of(tmp_path_factory.mktemp("corrupted"), valid, **{name: table})
        except pytest.fail.Exception:
            pytest.fail(f"not found: {what}")

    check()


def test_corruptions_of_a_table_are_found(tmp_path_factory, valid):
    find_corruptions(tmp_path_factory, valid, examples=40)


@pytest.mark.slow
def test_any_corruption_of_a_table_is_found(tmp_path_factory, valid):
    find_corruptions(tmp_path_factory, valid, examples=400)


@pytest.mark.parametrize("trials", [30, pytest.param(500, marks=pytest.mark.slow)])
def test_any_flipped_bit_or_cut_is_found_or_harmless(tmp_path, valid, trials):
    """Files with one flipped bit, or cut at a random byte: what is not refused must read exactly as before."""
    folder = rewrite(tmp_path / "flipped", valid["trajectories"][1])
    file, rng, harmless = folder / FILE, random.Random(0), 0
    good = file.read_bytes()
    before = pq.read_table(file)
    for trial in range(trials):
        data = bytearray(good)
        if trial % 10:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        else:
            data = data[: rng.randrange(len(data))]
        file.write_bytes(data)
        try:
            validate_dataset(folder)
        except InvalidDatasetError as error:
            assert str(file) in str(error)
        else:
            harmless += 1
            assert pq.read_table(file).equals(before), trial
    assert harmless < trials / 2  # flips in statistics and unused fields: much of so small a file is its footer
