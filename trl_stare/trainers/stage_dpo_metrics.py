"""What [`StageDPOTrainer`] logs about pairs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def pair_metrics(records: Tensor, stage_names: Sequence[str]) -> dict[str, float]:
    """Means over pairs, all and by stage.

    Args:
        records (`Tensor`): `[P, 8]`: index into `stage_names`, loss, reward of the chosen and of the rejected side (`beta`
            times the gain over the reference), their scores (log-likelihoods), their costs.
        stage_names (`Sequence[str]`): names.

    Returns:
        `dict[str, float]`: `rewards/chosen|rejected|margins|accuracies` and `logps/chosen|rejected`, as TRL calls them,
        and for each stage that has pairs `stage/{name}/loss|margin|accuracy|chosen_score|rejected_score|chosen_cost|
        rejected_cost|pairs`. `margin` is the difference of rewards, `accuracy` the share of margins > 0, `pairs` the
        number of pairs since the last log.

    Example: rewards 1, 0 of a Reach pair and 0, 2 of a Grasp pair: `rewards/margins` -0.5, `stage/Reach/margin` 1.0,
    `rewards/accuracies` 0.5.
    """
    stages, losses, chosen, rejected, *scores_and_costs = records.unbind(dim=1)
    margins = chosen - rejected
    right = (margins > 0).float()
    metrics = {
        "rewards/chosen": chosen.mean().item(),
        "rewards/rejected": rejected.mean().item(),
        "rewards/margins": margins.mean().item(),
        "rewards/accuracies": right.mean().item(),
        "logps/chosen": scores_and_costs[0].mean().item(),
        "logps/rejected": scores_and_costs[1].mean().item(),
    }
    columns = {"loss": losses, "margin": margins, "accuracy": right} | dict(
        zip(("chosen_score", "rejected_score", "chosen_cost", "rejected_cost"), scores_and_costs, strict=True)
    )
    for index, name in enumerate(stage_names):
        mine = stages == index
        if mine.any():
            metrics |= {f"stage/{name}/{column}": values[mine].mean().item() for column, values in columns.items()}
            metrics[f"stage/{name}/pairs"] = float(mine.sum())
    return metrics
