"""Episode starts: what the datasets of [`StagePPOTrainer`] hold."""

from __future__ import annotations

from datasets import Dataset


def check_starts(train_dataset: Dataset, eval_dataset: Dataset | None) -> None:
    """Refuse datasets without starts, and an evaluation on starts that are trained on.

    Raises:
        ValueError: says which dataset, and what it lacks or shares.
    """
    given = {"train_dataset": train_dataset} | ({} if eval_dataset is None else {"eval_dataset": eval_dataset})
    for name, dataset in given.items():
        if "seed" not in dataset.column_names or not len(dataset):
            raise ValueError(f"`{name}` must hold episode starts with a `seed`, got {dataset.column_names}.")
    if eval_dataset is not None and (shared := set(train_dataset["seed"]) & set(eval_dataset["seed"])):
        raise ValueError(
            f"`eval_dataset` must be held out from training, got {len(shared)} seeds of `train_dataset` (e.g. {min(shared)}). "
            "Give it a range of its own."
        )
