"""Whose a run's folder is, and how its seconds add up."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import yaml

from trl_stare.runs import (
    Stopwatch,
    as_number,
    claim_checkpoint,
    claim_folder,
    last_checkpoint,
    make_config,
    set_entries,
    training_settings,
)
from trl_stare.trainers import StageDPOConfig, StagePPOConfig, StageSFTConfig


@dataclass
class Settings:
    task: str = "any"
    training: dict[str, Any] = field(default_factory=dict)


def test_a_new_folder_keeps_the_settings(tmp_path):
    folder = claim_folder(tmp_path / "a" / "run", {"seed": 1, "policy": {"num_bins": 33}})
    assert yaml.safe_load((folder / "config.yaml").read_text()) == {"seed": 1, "policy": {"num_bins": 33}}


def test_the_same_settings_continue_and_others_are_refused(tmp_path):
    claim_folder(tmp_path, {"seed": 1, "phases": "a,b"})
    claim_folder(tmp_path, {"seed": 1, "phases": "b"}, free=("phases",))
    with pytest.raises(ValueError, match=r"must be new or of the same run, got .* has other \['seed'\]"):
        claim_folder(tmp_path, {"seed": 2, "phases": "b"}, free=("phases",))
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["seed"] == 1


def test_a_setting_that_is_no_longer_given_has_changed(tmp_path):
    claim_folder(tmp_path, {"seed": 1, "shaping_weight": 1.0, "note": None})
    with pytest.raises(ValueError, match=r"has other \['shaping_weight'\]"):
        claim_folder(tmp_path, {"seed": 1})
    claim_folder(tmp_path, {"seed": 1, "shaping_weight": 1.0})


@contextmanager
def full_disk() -> Iterator[None]:
    """Files end after eight bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_settings_and_seconds_that_were_there(tmp_path):
    claim_folder(tmp_path, {"seed": 1, "phases": "a,b"})
    watch = Stopwatch(tmp_path / "timing.json")
    with watch("training"):
        pass
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    with full_disk():
        with pytest.raises(OSError, match="File too large"):
            claim_folder(tmp_path, {"seed": 1, "phases": "b"}, free=("phases",))
        with pytest.raises(OSError, match="File too large"), watch("training"):
            pass
        claim_folder(tmp_path, {"seed": 1, "phases": "a,b"})  # nothing new, nothing written
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("text", ["", "seed: [1", "seed"])
def test_settings_that_cannot_be_read_say_what_to_do(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config.yaml that cannot be read.*delete the file and continue"):
        claim_folder(tmp_path, {"seed": 1})
    (tmp_path / "config.yaml").unlink()
    assert claim_folder(tmp_path, {"seed": 1}) == tmp_path


@pytest.mark.parametrize("text", ["", "[1.0]"])
def test_seconds_that_cannot_be_read_are_counted_anew(tmp_path, caplog, text):
    (tmp_path / "timing.json").write_text(text)
    with Stopwatch(tmp_path / "timing.json")("training"):
        pass
    assert "timing.json cannot be read" in caplog.text
    assert list(json.loads((tmp_path / "timing.json").read_text())) == ["training"]


def test_seconds_add_up_over_runs_and_count_failures(tmp_path):
    (tmp_path / "timing.json").write_text(json.dumps({"training": 100.0}))
    watch = Stopwatch(tmp_path / "timing.json")
    with pytest.raises(KeyError), watch("training"):
        raise KeyError
    with watch("videos"):
        pass
    seconds = json.loads((tmp_path / "timing.json").read_text())
    assert 100.0 < seconds["training"] < 110.0 and 0.0 <= seconds["videos"] < 10.0


@pytest.mark.parametrize(
    ("value", "expected"), [("1e-3", 0.001), (".5", 0.5), ("linear", "linear"), (7, 7), (True, True), (None, None)]
)
def test_numbers_that_yaml_takes_for_texts(value, expected):
    read = as_number(value)
    assert read == expected and type(read) is type(expected)


def test_flags_set_entries_of_sections():
    settings = Settings(training={"max_steps": 3, "seed": 1})
    flags = ["--training.max_steps", "5", "--training.bf16", "true", "--training.names=[q, v]", "--training.note=a=b"]
    assert set_entries(settings, flags) is settings
    assert settings.training == {"max_steps": 5, "seed": 1, "bf16": True, "names": ["q", "v"], "note": "a=b"}


def test_a_flag_without_a_value_is_refused():
    with pytest.raises(ValueError, match="every flag must have a value, got '--training.max_steps'"):
        set_entries(Settings(), ["--training.max_steps"])


@pytest.mark.parametrize("flag", ["--train.seed", "--training", "--task.name", "--training."])
def test_a_flag_of_no_section_is_refused_and_the_sections_are_named(flag):
    with pytest.raises(
        ValueError, match=f"unknown flag '{flag}'. Entries of training are given as --training.name value"
    ):
        set_entries(Settings(), [flag, "1"])


def test_the_last_checkpoint_of_a_folder_that_rank_0_has_yet_to_make(tmp_path):
    assert last_checkpoint(tmp_path / "new") is None and last_checkpoint(tmp_path) is None
    for step in (2, 10, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10"), "12 was cut off while it was saved"


def test_a_wrong_name_of_a_setting_is_told_with_its_section():
    assert make_config(Settings, "run", task="other") == Settings("other")
    with pytest.raises(ValueError, match="`run` must hold fields of Settings, got 'tasks'. Did you mean 'task'?"):
        make_config(Settings, "run", tasks="other")


def test_what_of_a_trainers_configuration_decides_about_its_weights(tmp_path):
    """Rewards once changed under way, and the card told the new ones; a run may be prolonged, and go on with other GPUs."""
    given = {"shaping_weight": 0.5, "learning_rate": 1e-4}
    before = training_settings(StagePPOConfig(str(tmp_path), **given))
    free = {
        "num_train_epochs": 9,
        "logging_steps": 7,
        "save_steps": 3,
        "stop_grace_s": 60.0,
        "eval_temperature": 0.5,
    }
    # against too little memory, or with more GPUs: an iteration keeps its updates
    minibatches = StagePPOConfig(str(tmp_path)).num_minibatches
    free |= {"gradient_accumulation_steps": 2, "num_minibatches": 2 * minibatches}
    assert training_settings(StagePPOConfig(str(tmp_path / "b"), **given, **free)) == before
    for alone in ("gradient_accumulation_steps", "num_minibatches"):
        after = training_settings(StagePPOConfig(str(tmp_path), **given, **{alone: free[alone]}))
        assert {name for name in before if before[name] != after[name]} == {"updates_per_iteration"}
    claim_folder(tmp_path, before)
    for changed in ({"shaping_weight": 0.0}, {"learning_rate": 1e-3}, {"seed": 3}, {"advantage_norm": "stage"}):
        after = training_settings(StagePPOConfig(str(tmp_path), **given | changed))
        with pytest.raises(ValueError, match=f"has other \\['{next(iter(changed))}'\\]"):
            claim_folder(tmp_path, after)
    assert training_settings(StageDPOConfig(str(tmp_path)))["beta"] == 1.0
    assert training_settings(StageSFTConfig(str(tmp_path)))["stage_balanced"] is False


def test_a_checkpoint_is_continued_by_its_own_settings_only(tmp_path):
    """Another model in the same `output_dir` once went on from the first one's checkpoint without a word."""
    assert claim_checkpoint(tmp_path, {"model": "a"}) is None
    assert claim_checkpoint(tmp_path, {"model": "b"}) is None  # nothing came of the first
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config.yaml has other \['model'\]"):
        claim_checkpoint(tmp_path, {"model": "a"})
    assert claim_checkpoint(tmp_path, {"model": "b"}) == str(tmp_path / "checkpoint-3")
    assert claim_checkpoint(tmp_path, {"model": "b", "seed": 1}, free=("seed",)) == str(tmp_path / "checkpoint-3")
