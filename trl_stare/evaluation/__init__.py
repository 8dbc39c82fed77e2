"""From a policy to a result: held-out rollouts, statistics, and what a reader gets to see."""

from trl_stare.evaluation.blocks import play_in_blocks
from trl_stare.evaluation.cards import PLAIN_METHODS, card_template, publish_results, write_model_card
from trl_stare.evaluation.comparison import CONDITIONS, Comparison, check_comparable, compare, comparison_table
from trl_stare.evaluation.eval_info import (
    RULES,
    build_eval_info,
    eval_results,
    eval_table,
    read_eval_info,
    task_metrics,
    write_eval_info,
)
from trl_stare.evaluation.evaluate import evaluate
from trl_stare.evaluation.inspection import inspect, plot_timelines
from trl_stare.evaluation.page import Evaluation, distinct_names, html_page, markdown_page
from trl_stare.evaluation.phases import PHASES, PhaseRecords, in_round, phase_order, phase_turn
from trl_stare.evaluation.played import PlayedEpisode, read_played, write_played
from trl_stare.evaluation.plots import plot_report
from trl_stare.evaluation.provenance import PolicySource, file_digests, resolve_policy
from trl_stare.evaluation.records import EpisodeResult, PhaseResult, paired, read_episodes, write_episodes
from trl_stare.evaluation.report import build_results, package_versions, read_results, write_report, write_results
from trl_stare.evaluation.robustness import (
    compare_varied,
    measure_robustness,
    played_variations,
    plot_variations,
    robustness_info,
    robustness_table,
    write_robustness,
)
from trl_stare.evaluation.statistics import (
    Difference,
    McNemar,
    Proportion,
    episodes_needed,
    format_rate,
    holm,
    mcnemar_exact,
    mean_difference,
    paired_difference,
    runs_needed,
)
from trl_stare.evaluation.suites import SUITES, check_distinct, held_out_starts, suite_tasks
from trl_stare.evaluation.training_runs import RunsComparison, compare_runs, runs_table
from trl_stare.evaluation.videos import (
    Replay,
    can_film,
    film_episode,
    film_policy,
    record_episode,
    save_success_and_failure,
    stage_labels,
)

__all__ = [
    "PLAIN_METHODS",
    "Evaluation",
    "html_page",
    "in_round",
    "markdown_page",
    "CONDITIONS",
    "PHASES",
    "RULES",
    "SUITES",
    "Comparison",
    "Difference",
    "EpisodeResult",
    "McNemar",
    "PhaseRecords",
    "PhaseResult",
    "PlayedEpisode",
    "PolicySource",
    "Proportion",
    "Replay",
    "RunsComparison",
    "build_eval_info",
    "build_results",
    "card_template",
    "check_comparable",
    "check_distinct",
    "can_film",
    "compare",
    "compare_runs",
    "compare_varied",
    "comparison_table",
    "distinct_names",
    "episodes_needed",
    "eval_results",
    "eval_table",
    "evaluate",
    "file_digests",
    "film_episode",
    "film_policy",
    "format_rate",
    "held_out_starts",
    "holm",
    "inspect",
    "mcnemar_exact",
    "mean_difference",
    "measure_robustness",
    "package_versions",
    "paired",
    "paired_difference",
    "phase_order",
    "phase_turn",
    "play_in_blocks",
    "played_variations",
    "plot_report",
    "plot_timelines",
    "plot_variations",
    "publish_results",
    "read_episodes",
    "read_eval_info",
    "read_played",
    "read_results",
    "record_episode",
    "resolve_policy",
    "robustness_info",
    "robustness_table",
    "runs_needed",
    "runs_table",
    "save_success_and_failure",
    "stage_labels",
    "suite_tasks",
    "task_metrics",
    "write_episodes",
    "write_eval_info",
    "write_model_card",
    "write_played",
    "write_report",
    "write_results",
    "write_robustness",
]
