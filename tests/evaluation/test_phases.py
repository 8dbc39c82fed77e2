"""Names and order of phases, and a run's records as they come to be."""

import pytest

from trl_stare.evaluation import PhaseRecords, in_round, phase_order, phase_turn

NAMES = {
    "imitation": ("imitation", 1), "preference": ("preference", 1), "preference-2": ("preference", 2),
    "preference-10": ("preference", 10), "interaction": ("interaction", 1),
}  # fmt: skip


@pytest.mark.parametrize(("name", "turn"), NAMES.items())
def test_a_name_says_phase_and_round(name, turn):
    assert phase_turn(name) == turn and in_round(*turn) == name


def test_phases_are_sorted_as_they_are_run():
    mixed = ["interaction", "preference-10", "preference-2", "imitation", "preference"]
    assert sorted(mixed, key=phase_order) == [*NAMES]


@pytest.mark.parametrize(
    "name",
    ["sft", "", "preference-", "preference-0", "preference-1", "preference-02", "preference--2", "preference-two"],
)
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="must be among imitation, preference, interaction and rounds"):
        phase_turn(name)


def test_records_say_where_a_killed_run_goes_on(tmp_path):
    records = PhaseRecords(tmp_path, ["imitation", "preference", "preference-2", "interaction"])
    assert records.done == [] and records.read() == {} and records.before("imitation") is None
    for phase in ("preference", "imitation"):
        records.write_training(phase, {"env_steps": 7})
        assert records.is_trained(phase) and phase not in records.done
        records.write(phase, {"of": phase})
    # the run is killed while the second round is evaluated
    records.write_training("preference-2", {"env_steps": 8})
    again = PhaseRecords(tmp_path, records.phases)
    assert again.done == ["imitation", "preference"] == [*again.read()]
    assert again.is_trained("preference-2") and again.training("preference-2") == {"env_steps": 8}
    assert again.before("preference-2") == "preference" == again.before("interaction")
    assert again.before("preference") == "imitation" and again.before("imitation") is None
    assert again.read()["preference"] == {"of": "preference"}
