"""The benchmark of reading on a dataset of ten episodes: every operation, and episodes that differ enough to be compared."""

import pytest

from benchmarks.reading import OPERATIONS, PLAN, Made, figures, measure, peak_mb
from trl_stare.data import build_pairs, save_trajectories


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "episodes"
    save_trajectories(Made(10), folder, PLAN)
    return folder


def test_there_are_pairs_to_convert():
    assert build_pairs(Made(10), PLAN, max_pairs_per_start=1).yield_table["Reach"]["made"] == 2


@pytest.mark.parametrize("operation", OPERATIONS)
def test_it_is_measured(operation, folder, tmp_path):
    found = measure(operation, str(folder), str(tmp_path))
    assert 0 < found["seconds"] < 60 and found["peak_mb"] > found["added_mb"] >= 0
    assert (found.get("decision_ms", 0) > 0) == (operation == "imitate")


def test_a_peak_is_never_below_an_earlier_one():
    before = peak_mb() + 1  # what the kernel had not added up yet
    found = figures(before, 0.0)
    assert found["added_mb"] == 0 and found["peak_mb"] == before
