"""What the configuration refuses, and what is logged per stage."""

import pytest
import torch

from trl_stare.data.pairs import OBJECTIVES
from trl_stare.trainers.stage_dpo_config import StageDPOConfig
from trl_stare.trainers.stage_dpo_metrics import pair_metrics


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "tpo"}, "`objective` must be one of"),
        ({"beta": 0.0}, "`beta`"),
        ({"temperature": 0.0}, "`temperature` must be positive"),
        ({"cost_coef": -0.1}, "`cost_coef`"),
        ({"margin_sign": 0}, "`margin_sign`"),
        ({"stage_weights": [1.0, -1.0]}, "`stage_weights`"),
        ({"stage_weights": [1.0], "objective": "tpo-mean"}, "`stage_weights`"),
        ({"step_micro_batch_size": 0}, "`step_micro_batch_size`"),
        ({"max_length": 512}, "`max_length`"),
        ({"loss_type": ["apo_zero"]}, "`loss_type` must be one of .* got ..apo_zero"),
        ({"loss_type": ["sigmoid", "ipo"]}, "`loss_type`"),
        ({"label_smoothing": 0.5, "loss_type": "robust"}, "`label_smoothing`"),
        ({"precompute_ref_log_probs": False}, "`precompute_ref_log_probs`"),
        ({"label_smoothing": 0.1}, "`label_smoothing`"),
    ],
)
def test_the_config_refuses(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        StageDPOConfig(str(tmp_path), use_cpu=True, **change)


def test_defaults_are_those_of_method_md(tmp_path):
    args = StageDPOConfig(str(tmp_path), use_cpu=True)
    assert (args.objective, args.beta, args.cost_coef, args.margin_sign) == ("sta-tpo", 1.0, 0.1, 1)
    assert args.temperature == 1.0
    assert (args.bf16, args.max_length, bool(args.gradient_checkpointing)) == (False, None, False)


def test_pair_metrics_by_hand():
    records = torch.tensor([[0, 0.5, 1.0, 0.0, -3.0, -4.0, 0.25, 1.5], [1, 0.9, 0.0, 2.0, -5.0, -6.0, 0.0, 0.5]])
    metrics = pair_metrics(records, ["Reach", "Grasp", "Transport"])
    assert (metrics["rewards/margins"], metrics["rewards/accuracies"]) == (-0.5, 0.5)
    assert (metrics["logps/chosen"], metrics["logps/rejected"]) == (-4.0, -5.0)
    reach = {name.removeprefix("stage/Reach/"): value for name, value in metrics.items() if "Reach" in name}
    assert reach == {
        "loss": 0.5, "margin": 1.0, "accuracy": 1.0, "pairs": 1.0,
        "chosen_score": -3.0, "rejected_score": -4.0, "chosen_cost": 0.25, "rejected_cost": 1.5,
    }  # fmt: skip
    assert metrics["stage/Grasp/accuracy"] == 0.0
    assert not any("Transport" in name for name in metrics)


def test_which_objectives_know_stages(tmp_path):
    known = {name: StageDPOConfig(str(tmp_path), use_cpu=True, objective=name).stage_aware for name in OBJECTIVES}
    assert known == {"sta-tpo": True, "sta-tpo-sum": True, "tpo-mean": False, "tpo-sum": False}
