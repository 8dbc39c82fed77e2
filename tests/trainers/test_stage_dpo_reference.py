"""Cached reference scores are found again where nothing changed, and never where anything did."""

import copy
import logging
import os

import pytest
import torch
from datasets import load_from_disk
from peft import LoraConfig, get_peft_model
from stage_dpo_toy import EPISODES, STAGE_PAIRS, WHOLE_PAIRS, make_policy, make_trainer, perturb

from trl_stare.data.collators import pairs_dataset
from trl_stare.policies.token_policy import TokenPolicy
from trl_stare.trainers.stage_dpo_reference import REFERENCE_COLUMNS, read_scores, write_scores
from trl_stare.trainers.stage_dpo_trainer import StageDPOTrainer


@pytest.fixture
def scored(monkeypatch):
    """Names of the datasets that were scored, not read."""
    names, score = [], StageDPOTrainer._score_dataset

    def spy(self, model, dataset, name, batch_size):
        names.append(name)
        return score(self, model, dataset, name, batch_size)

    monkeypatch.setattr(StageDPOTrainer, "_score_dataset", spy)
    return names


def scores(trainer):
    return {column: [*trainer.train_dataset[column]] for column in REFERENCE_COLUMNS}


def test_the_second_trainer_reads_what_the_first_one_scored(tmp_path, scored):
    first = make_trainer(make_policy(), tmp_path)
    assert len([*(tmp_path / "reference_scores").glob("*.safetensors")]) == 1
    second = make_trainer(make_policy(), tmp_path, step_micro_batch_size=2, per_device_train_batch_size=3)
    assert scored == ["train"] and scores(first) == scores(second)
    # a step of training does not change what the reference was
    second.train()
    assert scores(make_trainer(make_policy(), tmp_path)) == scores(first) and scored == ["train"]


def change_one_weight(policy):
    with torch.no_grad():
        policy.model.lm_head.weight[0, 0] += 1e-6


def change_statistics(policy):
    policy.state_mean = policy.state_mean + 0.1


def change_configuration(policy):
    policy.model.config.text_config.rms_norm_eps = 1e-2


def change_processor(policy):
    policy.processor.tokenizer.add_tokens(["<new>"])


@pytest.mark.parametrize("change", [change_one_weight, change_statistics, change_configuration, change_processor])
def test_another_policy_is_scored(tmp_path, scored, change):
    make_trainer(make_policy(), tmp_path)
    policy = make_policy()
    change(policy)
    changed = make_trainer(policy, tmp_path)
    assert scored == ["train", "train"]
    assert scores(changed) == scores(make_trainer(policy, tmp_path / "fresh"))


def edit(column, new):
    def change(row, index):
        return {column: new(row[column])} if index == 2 else row

    return lambda rows: rows.map(change, with_indices=True, features=rows.features)


def last_swapped(values):
    """The last decision's list backwards: other values, all of them valid."""
    return values[:-1] + [values[-1][::-1]]


@pytest.mark.parametrize(
    "change",
    [
        edit("chosen_trace", last_swapped),
        edit("chosen_state", last_swapped),
        edit("rejected_frames", lambda frames: [frame.rotate(90) for frame in frames]),
        edit("instruction", lambda text: text.replace("red", "green")),
        lambda rows: rows.select([0, 1, 2]),
        lambda rows: rows.select([1, 0, 2, 3]),
    ],
    ids=["trace", "state", "image", "instruction", "fewer", "order"],
)
def test_other_rows_are_scored(tmp_path, scored, change):
    rows, policy = pairs_dataset(EPISODES, STAGE_PAIRS), make_policy()
    make_trainer(policy, tmp_path, rows)
    changed = make_trainer(policy, tmp_path, change(rows))
    assert scored == ["train", "train"]
    assert scores(changed) == scores(make_trainer(policy, tmp_path / "fresh", change(rows)))


def test_another_objective_temperature_or_precision_is_scored(tmp_path, scored):
    policy = make_policy()
    by_mean = make_trainer(policy, tmp_path, WHOLE_PAIRS, objective="tpo-mean")
    by_sum = make_trainer(policy, tmp_path, WHOLE_PAIRS, objective="tpo-sum")
    hot = make_trainer(policy, tmp_path, WHOLE_PAIRS, objective="tpo-sum", temperature=2.0)
    rounded = make_trainer(policy, tmp_path, WHOLE_PAIRS, objective="tpo-sum", bf16=True)
    assert scored == ["train"] * 4
    assert len({scores(trainer)["ref_chosen_logps"][0] for trainer in (by_mean, by_sum, hot, rounded)}) == 4


def test_a_reference_of_its_own_is_what_counts(tmp_path, scored):
    policy, other = make_policy(), make_policy()
    perturb(other)
    own = make_trainer(policy, tmp_path)
    with_other = make_trainer(policy, tmp_path, ref_policy=other)
    assert scored == ["train", "train"] and scores(with_other) != scores(own)
    assert scores(with_other) == scores(make_trainer(copy.copy(other), tmp_path / "fresh"))


def test_lora_is_read_again_and_its_scale_counts(tmp_path, scored):
    """As a reference of its own an adapter is on, and `lora_alpha` scales it; of a policy of its own it is off."""
    found = []
    for alpha in (4, 4, 8):
        reference = make_policy()
        torch.manual_seed(0)
        config = LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj"], init_lora_weights=False)
        reference.model = get_peft_model(reference.model, config)
        found.append(scores(make_trainer(make_policy(), tmp_path, ref_policy=reference))["ref_chosen_logps"])
    assert scored == ["train", "train"] and found[0] == found[1] != found[2]
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=False)
    off = scores(make_trainer(make_policy(), tmp_path, peft_config=config))["ref_chosen_logps"]
    assert off != found[0] and off == pytest.approx(scores(make_trainer(make_policy(), tmp_path))["ref_chosen_logps"])


def test_the_cache_lies_beside_the_dataset_or_where_it_is_told(tmp_path, scored):
    pairs_dataset(EPISODES, STAGE_PAIRS).save_to_disk(tmp_path / "rows")
    rows = load_from_disk(tmp_path / "rows")
    make_trainer(make_policy(), tmp_path / "out", rows)
    assert len([*(tmp_path / "rows").glob("reference-*.safetensors")]) == 1
    make_trainer(make_policy(), tmp_path / "out", rows, ref_cache_dir=str(tmp_path / "mine"))
    assert len([*(tmp_path / "mine").glob("reference-*.safetensors")]) == 1
    assert not (tmp_path / "out" / "reference_scores").exists()
    # the same content in memory is the same
    make_trainer(make_policy(), tmp_path / "other", ref_cache_dir=str(tmp_path / "mine"))
    assert scored == ["train", "train"]


def test_a_saved_and_loaded_policy_is_the_same(tmp_path, scored):
    make_policy().save_pretrained(tmp_path / "policy")
    for _ in range(2):
        make_trainer(TokenPolicy.from_pretrained(tmp_path / "policy"), tmp_path)
    assert scored == ["train"]


def flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("damage", [flip, lambda data: data[: len(data) // 2], lambda _: b"", lambda _: b"noise" * 9])
def test_a_corrupt_cache_is_computed_anew_with_a_warning(tmp_path, scored, caplog, damage):
    expected = scores(make_trainer(make_policy(), tmp_path))
    (file,) = (tmp_path / "reference_scores").iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    with caplog.at_level(logging.WARNING):
        assert scores(make_trainer(make_policy(), tmp_path)) == expected
    assert "computed anew" in caplog.text and file.name in caplog.text
    assert scored == ["train", "train"] and file.read_bytes() == whole


def test_every_flipped_byte_is_seen(tmp_path):
    path, written = tmp_path / "scores", {column: torch.randn(3) for column in REFERENCE_COLUMNS}
    write_scores(path, written)
    data = path.read_bytes()
    for index in range(len(data)):
        path.write_bytes(data[:index] + bytes([data[index] ^ 0x20]) + data[index + 1 :])
        found = read_scores(path, 3)
        assert found is None or all(torch.equal(found[column], written[column]) for column in written)
    path.write_bytes(data)
    assert read_scores(path, 3) is not None and read_scores(path, 4) is None


def test_a_folder_that_cannot_be_written_does_not_stop_training(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        make_trainer(make_policy(), tmp_path, ref_cache_dir=str(tmp_path / "file"))
    assert "Set `ref_cache_dir`" in caplog.text
    assert os.listdir(tmp_path) == ["file"]
