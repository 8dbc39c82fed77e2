"""What the configuration refuses, and what is logged per stage."""

import pytest
import torch

from trl_stare.trainers.stage_dpo_config import StageDPOConfig
from trl_stare.trainers.stage_dpo_trainer import pair_metrics


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "tpo"}, "`objective` must be one of"),
        ({"beta": 0.0}, "`beta`"),
        ({"cost_coef": -0.1}, "`cost_coef`"),
        ({"margin_sign": 0}, "`margin_sign`"),
        ({"stage_weights": [1.0, -1.0]}, "`stage_weights`"),
        ({"stage_weights": [1.0], "objective": "tpo-mean"}, "`stage_weights`"),
        ({"step_micro_batch_size": 0}, "`step_micro_batch_size`"),
        ({"max_length": 512}, "`max_length`"),
        ({"loss_type": ["ipo"]}, "`loss_type`"),
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
    assert (args.bf16, args.max_length, bool(args.gradient_checkpointing)) == (False, None, False)


def test_pair_metrics_by_hand():
    records = torch.tensor([[0, 0.5, 1.0, 0.0], [1, 0.9, 0.0, 2.0]])
    metrics = pair_metrics(records, ["Reach", "Grasp", "Transport"])
    assert metrics["rewards/margins"] == -0.5
    assert metrics["rewards/accuracies"] == 0.5
    assert metrics["stage/Reach/margin"] == 1.0
    assert metrics["stage/Grasp/accuracy"] == 0.0
    assert metrics["stage/Grasp/pairs"] == 1.0
    assert not any("Transport" in name for name in metrics)
