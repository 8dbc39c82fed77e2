"""From a policy to a result: held-out rollouts, statistics, and what a reader gets to see."""

from trl_stare.evaluation.cards import card_template, write_model_card
from trl_stare.evaluation.evaluate import evaluate
from trl_stare.evaluation.inspection import inspect, plot_timelines
from trl_stare.evaluation.plots import plot_report
from trl_stare.evaluation.records import PHASES, EpisodeResult, PhaseResult, paired, read_episodes, write_episodes
from trl_stare.evaluation.report import build_results, package_versions, read_results, write_report, write_results
from trl_stare.evaluation.statistics import McNemar, Proportion, format_rate, mcnemar_exact
from trl_stare.evaluation.videos import (
    Replay,
    film_episode,
    film_policy,
    record_episode,
    save_success_and_failure,
    stage_labels,
)

__all__ = [
    "PHASES",
    "EpisodeResult",
    "McNemar",
    "PhaseResult",
    "Proportion",
    "Replay",
    "build_results",
    "card_template",
    "evaluate",
    "film_episode",
    "film_policy",
    "format_rate",
    "inspect",
    "mcnemar_exact",
    "package_versions",
    "paired",
    "plot_report",
    "plot_timelines",
    "read_episodes",
    "read_results",
    "record_episode",
    "save_success_and_failure",
    "stage_labels",
    "write_episodes",
    "write_model_card",
    "write_report",
    "write_results",
]
