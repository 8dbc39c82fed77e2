"""Episodes whose plan has changed since they were stored."""

from dataclasses import replace

import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from trl_stare.data import check_labels, load_trajectories, relabel_dataset, save_trajectories, validate_dataset
from trl_stare.stages import get_plan

PLAN = get_plan("StackCube-v1")
REACH, *REST = PLAN.stages
EARLIER = replace(
    PLAN, stages=(replace(REACH, done=lambda s: s["success"] | True, reads=(*REACH.reads, "success")), *REST)
)
"""Reach is over with the first action."""


@pytest.fixture
def rollouts(tmp_path, episode):
    save_trajectories(
        [episode(0, success_at=4), episode(1)], tmp_path / "rollouts", PLAN, metadata={"visuals": "light"}
    )
    return tmp_path / "rollouts"


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (EARLIER, r"row 0 must be labelled by the plan of 'StackCube-v1' as it is now, got `stage` \[0, 0, 1"),
        (
            replace(PLAN, stages=(replace(REACH, name="Approach"), *REST)),
            r"row 0 .* got `stage_names` \['Reach', 'Grasp'",
        ),
        (replace(PLAN, stages=(replace(REACH, cost_scale=2 * REACH.scale), *REST)), "row 0 .* got `segments`"),
    ],
)
def test_labels_of_another_plan_are_found_and_made_anew(rollouts, tmp_path, plan, message):
    check_labels(rollouts, PLAN)
    with pytest.raises(ValueError, match=message):
        check_labels(rollouts, plan)
    before, table = load_trajectories(rollouts), pq.read_table(rollouts)
    relabel_dataset(rollouts, plan)
    check_labels(rollouts, plan)
    validate_dataset(rollouts)
    after = pq.read_table(rollouts)
    assert after.schema.equals(table.schema, check_metadata=True)
    labels = ["stage_names", "stage", "segments"]
    assert after.drop_columns(labels) == table.drop_columns(labels) and after != table
    assert len(load_trajectories(rollouts)) == len(before) == 2
    row = load_dataset(str(rollouts), split="train", cache_dir=str(tmp_path / "cache"))[0]
    assert tuple(row["stage_names"]) == plan.names


def test_rounding_of_costs_is_no_other_plan(rollouts):
    file = rollouts / "train-00000-of-00001.parquet"
    rows = pq.read_table(file)
    parts = rows["segments"].to_pylist()
    parts[1][0]["cost"] *= 1 + 1e-8
    index = rows.schema.get_field_index("segments")
    pq.write_table(rows.set_column(index, rows.schema.field(index), [parts]), file)
    check_labels(rollouts, PLAN)
    parts[1][0]["cost"] *= 1.001
    pq.write_table(rows.set_column(index, rows.schema.field(index), [parts]), file)
    with pytest.raises(ValueError, match="row 1 .* got `segments`"):
        check_labels(rollouts, PLAN)
