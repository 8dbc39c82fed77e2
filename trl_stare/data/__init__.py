"""Trajectories: playing them, storing them, and turning them into training data."""

from trl_stare.data.collators import check_traces, pairs_dataset
from trl_stare.data.collection import collect_dataset, relabel_dataset
from trl_stare.data.demonstrations import DemonstrationCollator, demonstration_dataset
from trl_stare.data.folder import TrajectoryFolder
from trl_stare.data.labels import check_labels
from trl_stare.data.pairs import PairSet, StagePair, build_pairs, format_yield
from trl_stare.data.rollout import collect, demonstrate, play, replay, stream, warn_of_void
from trl_stare.data.schema import load_pairs, load_trajectories, save_pairs, save_trajectories, stored_settings
from trl_stare.data.trajectory import Trajectory
from trl_stare.data.validate import InvalidDatasetError, validate_dataset

__all__ = [
    "DemonstrationCollator",
    "InvalidDatasetError",
    "PairSet",
    "StagePair",
    "Trajectory",
    "TrajectoryFolder",
    "build_pairs",
    "check_labels",
    "check_traces",
    "collect",
    "collect_dataset",
    "demonstrate",
    "demonstration_dataset",
    "format_yield",
    "load_pairs",
    "load_trajectories",
    "pairs_dataset",
    "play",
    "relabel_dataset",
    "replay",
    "save_pairs",
    "save_trajectories",
    "stored_settings",
    "stream",
    "warn_of_void",
    "validate_dataset",
]
