"""A folder is a sequence like the list of its trajectories, and reads no more than it is asked for."""

import pickle
from dataclasses import fields, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from trl_stare.data import collators, schema
from trl_stare.data import folder as folder_module
from trl_stare.data.collators import PreferenceCollator, pairs_dataset
from trl_stare.data.demonstrations import DemonstrationCollator, demonstration_dataset
from trl_stare.data.folder import TrajectoryFolder
from trl_stare.data.pairs import build_pairs
from trl_stare.data.schema import decode_png, load_trajectories, save_trajectories
from trl_stare.stages import get_plan

PLAN = get_plan("StackCube-v1")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, episode):
    """A folder of three files of 10, 10 and 3 episodes in row groups of 4, and the episodes."""
    made = [replace(episode(i, num_steps=9 + i % 3, success_at=8 if i % 2 else None), seed=i // 4) for i in range(23)]
    folder = tmp_path_factory.mktemp("saved") / "rollouts"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "EPISODES_PER_SHARD", 10)
        save_trajectories(made, folder, PLAN)
    return folder, load_trajectories(folder)


def assert_equal(left, right):
    for field in fields(left):
        one, other = getattr(left, field.name), getattr(right, field.name)
        if field.name == "signals":
            assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        else:
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, field.name


def test_it_is_the_list(saved):
    folder, episodes = saved
    sequence = TrajectoryFolder(folder, cache_size=2)
    assert len(sequence) == 23
    for row in [22, 0, 9, 10, 3, 4, 3, 19, 20, -1, -23]:
        assert_equal(sequence[row], episodes[row])
    for one, other in zip(sequence, episodes, strict=True):
        assert_equal(one, other)
    assert [one.seed for one in sequence[8:13:2]] == [one.seed for one in episodes[8:13:2]]
    for row in (23, -24):
        with pytest.raises(IndexError, match=rf"must be in \[-23, 23\), got {row}"):
            sequence[row]
    assert_equal(pickle.loads(pickle.dumps(sequence))[7], episodes[7])


def test_a_row_group_is_read_once(saved, monkeypatch):
    sequence, read = TrajectoryFolder(saved[0], cache_size=3), []
    original = sequence._read
    monkeypatch.setattr(sequence, "_read", lambda row: read.append(row) or original(row))
    kept = sequence[5]
    assert [sequence[row] is kept for row in (6, 5, 7, 5)] == [False, True, False, True]
    assert read == [5, 6, 7]
    sequence[8], sequence[9], sequence[10]
    assert sequence[5] is not kept and len(sequence._episodes) == 3


def test_without_images(saved):
    folder, episodes = saved
    sequence = TrajectoryFolder(folder, images=False)
    assert sequence[11].images.shape == (len(episodes[11].starts), 0, 0, 3)
    assert sequence[11].final_image.shape == (0, 0, 3)
    seen = {name: getattr(episodes[11], name) for name in ("images", "final_image")}
    assert_equal(replace(sequence[11], **seen), episodes[11])
    assert build_pairs(sequence, PLAN) == build_pairs(episodes, PLAN)
    assert demonstration_dataset(sequence, PLAN)[:] == demonstration_dataset(episodes, PLAN)[:]


def test_training_data_are_those_of_the_list(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(collators, "ROWS_PER_TABLE", 16)
    folder, episodes = saved
    sequence = TrajectoryFolder(folder)
    pairs = build_pairs(episodes, PLAN, min_cost_gap=0.0).pairs
    expected = pairs_dataset(episodes, pairs)
    for rows in (
        pairs_dataset(sequence, pairs),
        pairs_dataset(sequence, pairs, file=tmp_path / "rows" / "pairs.arrow"),
    ):
        assert len(rows) == len(pairs) > 32 and rows.features == expected.features
        assert rows.data.table.equals(expected.data.table)
    assert [path.name for path in (tmp_path / "rows").iterdir()] == ["pairs.arrow"]

    def prepare(obs):
        return {"images": obs.images, "state": obs.state}

    batches = [PreferenceCollator(prepare, 2)([rows[0], rows[33]]) for rows in (rows, expected)]
    assert torch.equal(batches[0]["inputs"]["images"], batches[1]["inputs"]["images"])
    rows = [*demonstration_dataset(episodes, PLAN)][3:6]
    batches = [
        DemonstrationCollator(given, prepare, lambda chunk: chunk.flatten(1), 4)(rows)
        for given in (sequence, episodes)
    ]
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[1])


def test_one_picture_of_an_episode_is_decoded(saved, tmp_path, monkeypatch):
    """Of those that a batch of demonstrations looks at, and no other: an episode at 224 px takes a tenth of a second."""
    folder, episodes = saved
    sequence, decoded = TrajectoryFolder(folder, cache_dir=tmp_path), []
    for module in (schema, folder_module):
        monkeypatch.setattr(module, "decode_png", lambda data: decoded.append(1) or decode_png(data))
    for row, decision in [(22, 0), (0, 2), (9, 1), (-1, 0)]:
        assert torch.equal(sequence.image(row, decision), episodes[row].images[decision])
    assert len(decoded) == 4
    rows = [*demonstration_dataset(sequence, PLAN)]
    assert len(decoded) == 4
    DemonstrationCollator(sequence, lambda obs: {"images": obs.images}, lambda chunk: chunk.flatten(1), 4)(rows[3:6])
    assert len(decoded) == 4 + 3
    monkeypatch.undo()

    shared = pickle.loads(pickle.dumps(sequence.light()))
    assert not shared.images and shared.light() is shared
    assert torch.equal(shared.image(11, 1), episodes[11].images[1])
    assert list(tmp_path.rglob("*.arrow")) == list(Path(shared.cache_dir).rglob("*.arrow"))
    for row, decision, what in [
        (23, 0, "`position`"),
        (0, 3, r"`decision` must be in \[0, 3\), got 3"),
        (0, -1, "`decision`"),
    ]:
        with pytest.raises(IndexError, match=what):
            sequence.image(row, decision)


def test_a_picture_of_a_folder_that_was_written_anew_is_the_new_one(episode, tmp_path):
    for shade in (10, 200):
        made = replace(episode(0), images=torch.full_like(episode(0).images, shade))
        save_trajectories([made], tmp_path / "data", PLAN)
        sequence = TrajectoryFolder(tmp_path / "data", cache_dir=tmp_path / "cache")
        assert sequence.image(0, 0).unique().tolist() == [shade]


def test_a_damaged_picture_is_named(episode, tmp_path):
    save_trajectories([episode(0), episode(1)], tmp_path / "data", PLAN)
    (file,) = (tmp_path / "data").glob("*.parquet")
    table = pq.read_table(file)
    cells = table["images"].to_pylist()
    cells[1][1]["bytes"] = b"no picture"
    place, column = table.schema.get_field_index("images"), table.schema.field("images")
    pq.write_table(table.set_column(place, column, pa.array(cells, column.type)), file)
    sequence = TrajectoryFolder(tmp_path / "data", cache_dir=tmp_path / "cache")
    assert torch.equal(sequence.image(1, 0), episode(1).images[0])
    with pytest.raises(ValueError, match=rf"`{file}`, row 1, the picture of decision 1 cannot be read"):
        sequence.image(1, 1)


def test_pairs_across_starts_read_an_episode_once(saved, monkeypatch):
    """They come back to every episode in no order; what does not fit into memory is read again, and the rows are the same."""
    folder, episodes = saved
    pairs = build_pairs(episodes, PLAN, min_cost_gap=0.0, fill=True).pairs
    assert len({pair.seed for pair in pairs if pair.reason == "across"}) > 2
    used, read = {index for pair in pairs for index in (pair.chosen, pair.rejected)}, []
    sequence = TrajectoryFolder(folder, cache_size=1)
    original = sequence._read
    monkeypatch.setattr(sequence, "_read", lambda row: read.append(row) or original(row))
    assert build_pairs(sequence, PLAN, min_cost_gap=0.0, fill=True).pairs == pairs
    assert read == [*range(23)]
    read.clear()
    rows = pairs_dataset(sequence, pairs)
    assert sorted(read) == sorted(used)
    monkeypatch.setattr(collators, "ENCODED_BYTES", 1)
    assert pairs_dataset(sequence, pairs).data.table.equals(rows.data.table) and len(read) > 2 * len(used)
    assert rows.data.table.equals(pairs_dataset(episodes, pairs).data.table)


def test_no_pairs_make_an_empty_dataset(saved, tmp_path):
    assert len(pairs_dataset([], [])) == 0 and len(pairs_dataset([], [], file=tmp_path / "empty.arrow")) == 0


def test_a_failed_conversion_leaves_the_old_file(saved, tmp_path):
    folder, episodes = saved
    file = tmp_path / "pairs.arrow"
    pairs = build_pairs(episodes, PLAN, min_cost_gap=0.0).pairs
    pairs_dataset(episodes, pairs[:3], file=file)
    with pytest.raises(ValueError, match="got 99 in pair 1"):
        pairs_dataset(episodes, [pairs[0], replace(pairs[1], chosen=99)], file=file)
    assert len(type(pairs_dataset([], [])).from_file(str(file))) == 3


def test_what_cannot_be_read_is_named(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        TrajectoryFolder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="`cache_size` must be at least 1, got 0"):
        TrajectoryFolder(saved[0], cache_size=0)
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in saved[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    file = sorted(folder.iterdir())[1]
    column = pq.ParquetFile(file).metadata.row_group(0).column(0)
    data = bytearray(file.read_bytes())
    # one of the values: a page's header has no checksum
    data[column.data_page_offset + column.total_compressed_size - 1] ^= 1
    file.write_bytes(data)
    sequence = TrajectoryFolder(folder)
    assert sequence[0].seed == 0 and sequence[22].seed == 5
    with pytest.raises(ValueError, match=rf"{file.name}`, row group \d is damaged"):
        list(sequence)
