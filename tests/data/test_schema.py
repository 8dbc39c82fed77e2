"""What is saved comes back exactly, and loads without our code."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from dataclasses import fields, replace  # noqa: E402

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset, load_dataset  # noqa: E402

from trl_stare.data import schema  # noqa: E402
from trl_stare.data.pairs import StagePair  # noqa: E402
from trl_stare.data.parquet import to_table  # noqa: E402
from trl_stare.data.schema import load_pairs, load_trajectories, save_pairs, save_trajectories  # noqa: E402
from trl_stare.data.trajectory import Trajectory  # noqa: E402
from trl_stare.stages import get_plan  # noqa: E402

PLAN = get_plan("StackCube-v1")


def assert_equal(left: Trajectory, right: Trajectory):
    for field in fields(Trajectory):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if field.name == "signals":
            assert a.keys() == b.keys()
            assert all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)
        elif isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype, field.name
            assert torch.equal(a, b), field.name
        else:
            assert a == b, field.name


@pytest.mark.parametrize("traced", [True, False])
def test_trajectories_come_back_exactly(tmp_path, episode, monkeypatch, traced):
    monkeypatch.setattr(schema, "EPISODES_PER_SHARD", 2)
    episodes = [
        episode(seed, num_steps=5 + seed, traced=traced, success_at=4 if seed % 2 else None) for seed in range(5)
    ]
    save_trajectories(episodes, tmp_path / "data" / "rollouts", PLAN, metadata={"visuals": "light"})
    names = sorted(path.name for path in (tmp_path / "data" / "rollouts").iterdir())
    assert names == [f"train-{i:05d}-of-00003.parquet" for i in range(3)]
    loaded = load_trajectories(tmp_path / "data" / "rollouts")
    assert len(loaded) == 5
    for before, after in zip(episodes, loaded, strict=True):
        assert_equal(replace(before, features=None), after)


@pytest.mark.parametrize("traced", [True, False])
def test_tables_are_those_of_datasets(episode, traced):
    episodes = [episode(seed, num_steps=5 + seed, traced=traced) for seed in range(3)]
    features = schema._features_of(episodes)
    rows = [schema._to_row(index, episode, PLAN, "{}") for index, episode in enumerate(episodes)]
    expected = Dataset.from_dict(
        {name: [row[name] for row in rows] for name in features}, features=features
    ).data.table
    made = to_table(rows, features)
    assert made.schema.equals(expected.schema, check_metadata=True)
    assert made.equals(expected.combine_chunks())


def test_plain_load_dataset_shows_the_stages(tmp_path, episode):
    first = episode(0, num_steps=6, success_at=4)
    save_trajectories([first, episode(1)], tmp_path / "rollouts", PLAN, metadata={"visuals": "light"})
    rows = load_dataset(str(tmp_path / "rollouts"), split="train", cache_dir=str(tmp_path / "cache"))
    row = rows[0]
    assert rows["id"] == [0, 1] and rows["success_once"] == [True, False]
    assert row["stage_names"] == ["Reach", "Grasp", "Transport", "Stack"]
    assert [(s["stage"], s["start"], s["stop"], s["passed"]) for s in row["segments"]] == [
        (0, 0, 2, True),
        (1, 2, 4, True),
        (2, 4, 4, True),
        (3, 4, 4, True),
    ]
    assert row["stage"][:2] == [0, 0] and row["stage"][4:] == [4, 4]
    assert np.array_equal(np.array(row["images"][1]), first.images[1].numpy())
    assert torch.equal(torch.tensor(row["signal.tcp_position"]), first.signals["tcp_position"])
    assert row["metadata"] == '{"visuals": "light"}'


def test_saving_again_replaces_and_leaves_nothing_behind(tmp_path, episode):
    save_trajectories([episode(seed) for seed in range(3)], tmp_path / "rollouts", PLAN)
    save_trajectories([episode(9)], tmp_path / "rollouts", PLAN)
    assert [t.seed for t in load_trajectories(tmp_path / "rollouts")] == [9]
    assert [path.name for path in tmp_path.iterdir()] == ["rollouts"]


def test_a_failed_save_keeps_what_was_there(tmp_path, episode):
    save_trajectories([episode(3)], tmp_path / "rollouts", PLAN)
    broken = replace(episode(4), task="Other-v1")
    with pytest.raises(ValueError, match="'Other-v1' at 1"):
        save_trajectories([episode(5), broken], tmp_path / "rollouts", PLAN)
    assert [t.seed for t in load_trajectories(tmp_path / "rollouts")] == [3]


def test_saving_refuses_what_it_cannot_keep(tmp_path, episode):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    one = episode(0)
    other_signals = replace(one, signals={**one.signals, "extra": torch.zeros(7)})
    doubles = replace(one, signals={**one.signals, "extra": torch.zeros(7, dtype=torch.float64)})
    cases = [
        ([], "rollouts", "at least one"),
        ([one], "mine", "notes.txt"),
        ([one, other_signals], "rollouts", "at 1"),
    ]
    for episodes, folder, message in [*cases, ([doubles], "rollouts", "float64")]:
        with pytest.raises(ValueError, match=message):
            save_trajectories(episodes, tmp_path / folder, PLAN)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"


def test_one_kind_of_data_does_not_replace_the_other(tmp_path, episode):
    """Pairs that were written over the rollouts they are of once left nothing of these."""
    save_trajectories([episode(3)], tmp_path / "rollouts", PLAN)
    with pytest.raises(
        ValueError, match="`folder` must be new or .* train-00000-of-00001.parquet has no column 'stage_name'"
    ):
        save_pairs([PAIR], tmp_path / "rollouts")
    save_pairs([PAIR], tmp_path / "pairs")
    with pytest.raises(ValueError, match="has no column 'id'"):
        save_trajectories([episode(3)], tmp_path / "pairs", PLAN)
    assert len(load_trajectories(tmp_path / "rollouts")) == len(load_pairs(tmp_path / "pairs")) == 1


PAIR = StagePair("StackCube-v1", "stack", 3, 1, "Grasp", 0, 1, 2, 5, 1, 6, 0.1, 1 / 3, "passed")


@pytest.mark.parametrize("pairs", [(), (PAIR, replace(PAIR, seed=4, reason="cost"))])
def test_pairs_come_back_exactly(tmp_path, pairs):
    save_pairs(pairs, tmp_path / "preferences")
    assert load_pairs(tmp_path / "preferences") == pairs


def test_a_file_that_is_not_ours_names_itself_and_the_column(tmp_path, episode):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_trajectories(tmp_path / "nowhere")
    folder = tmp_path / "rollouts"
    save_trajectories([episode(0)], folder, PLAN)
    file = folder / "train-00000-of-00001.parquet"
    good = pq.read_table(file)

    pq.write_table(good.drop_columns(["actions"]), file)
    with pytest.raises(ValueError, match=r"train-00000.*'actions'.*no such column"):
        load_trajectories(folder)

    seeds = pa.array(["zero"])
    pq.write_table(good.set_column(good.column_names.index("seed"), "seed", seeds), file)
    with pytest.raises(ValueError, match=r"train-00000.*'seed'.*int64"):
        load_trajectories(folder)

    ragged = pa.array([[[1.0, 2.0], [3.0]]], type=good.schema.field("actions").type)
    pq.write_table(good.set_column(good.column_names.index("actions"), good.schema.field("actions"), ragged), file)
    with pytest.raises(ValueError, match=r"train-00000.*row 0, column 'actions'"):
        load_trajectories(folder)

    spoiled = pa.array([{"bytes": b"no image", "path": None}], type=good.schema.field("final_image").type)
    position = good.column_names.index("final_image")
    pq.write_table(good.set_column(position, good.schema.field("final_image"), spoiled), file)
    with pytest.raises(ValueError, match=r"train-00000.*row 0, column 'final_image'"):
        load_trajectories(folder)

    file.write_bytes(b"not parquet at all")
    with pytest.raises(ValueError, match=r"train-00000.*must be a parquet file"):
        load_trajectories(folder)


def test_a_prefix_is_not_lost_silently(tmp_path, episode):
    begun_late = replace(episode(0), prefix=torch.zeros(5, 7))
    with pytest.raises(ValueError, match="got one at 0 whose `prefix` of 5 actions came first"):
        save_trajectories([begun_late], tmp_path / "late", PLAN)
    assert not (tmp_path / "late").exists()
