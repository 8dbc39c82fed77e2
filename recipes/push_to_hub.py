"""Push trajectories and preference pairs to the Hub as one dataset repository, with a card; one commit, or none if nothing changed.

    hf auth login
    python recipes/push_to_hub.py --trajectories data/rollouts --preferences data/pairs --repo_id user/stackcube-pairs

All data are checked first, and everything that is wrong with them is said at once. Afterwards anyone has them by
`datasets.load_dataset("user/stackcube-pairs", "trajectories")`, and `trl_stare.data.hub.download_dataset` fetches the folders.
"""

import logging
from dataclasses import dataclass, field

from trl import TrlParser

from trl_stare.data.hub import push_dataset

logger = logging.getLogger("push_to_hub")


@dataclass
class PushArguments:
    """What to push, and where to."""

    trajectories: str = field(metadata={"help": "Folder of stored trajectories (see `recipes/collect.py`)."})
    repo_id: str = field(metadata={"help": "The repository, 'user/name'; created if it does not exist."})
    preferences: str | None = field(
        default=None, metadata={"help": "Folder of their pairs (see `recipes/pairs.py`); default none."}
    )
    private: bool = field(
        default=False,
        metadata={"help": "Create the repository so that only you see it; default as your organisation has it."},
    )
    license: str = field(default="apache-2.0", metadata={"help": "Identifier of the licence, as the Hub lists it."})


def main(args: PushArguments) -> None:
    """Push; refusals end with a sentence that says what to do."""
    try:
        # not False, which is public whatever an organisation has chosen
        private = args.private or None
        commit = push_dataset(args.trajectories, args.preferences, args.repo_id, private=private, license=args.license)
    except (ValueError, OSError) as error:
        raise SystemExit(f"push_to_hub: {error}") from error
    logger.info("%s holds the data, in commit %s", args.repo_id, commit)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(TrlParser(PushArguments).parse_args_and_config()[0])
