"""Datasets on the Hub: pushed in one commit that changes nothing the second time, fetched with their checksums looked at.

A repository has two configurations, `trajectories` and `preferences`, of plain parquet files, so that the Hub's viewer and
`datasets.load_dataset(repo_id, "trajectories")` need no code of ours.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from trl_stare.data.cards import render_dataset_card, stage_strip
from trl_stare.data.pairs import load_yield, yield_file
from trl_stare.data.parquet import parquet_files
from trl_stare.data.validate import validate_dataset

TRAJECTORIES, PREFERENCES, PICTURE = "trajectories", "preferences", "stages.png"
YIELD = yield_file(PREFERENCES).name


def push_dataset(
    trajectories: str | Path,
    preferences: str | Path | None,
    repo_id: str,
    *,
    private: bool | None = None,
    license: str = "apache-2.0",
    token: str | None = None,
) -> str:
    """Make a dataset repository hold these folders, a card and a picture, in one commit.

    Readers see all of the old data or all of the new. Parquet files of an earlier push that are no longer part of the data
    are deleted in the same commit; other files in the repository stay. If the repository holds everything already, there
    is no commit: pushing again after a failure is safe.

    Args:
        trajectories (`str` or `Path`): folder of [`save_trajectories`].
        preferences (`str` or `Path`, *optional*): folder of [`save_pairs`], made from these trajectories. A yield table
            that [`save_yield`] put beside it goes along.
        repo_id (`str`): `"user/name"`; created if it does not exist.
        private (`bool`, *optional*): create it so; by default as the account or organisation has it. The visibility of a repository
            that exists is left as it is.
        license (`str`): identifier as the Hub lists it.
        token (`str`, *optional*): by default the one of `hf auth login` or `HF_TOKEN`.

    Returns:
        the id of the commit that holds the data.

    Raises:
        InvalidDatasetError: if there is anything wrong with the data (see [`validate_dataset`]); nothing is pushed.
        PermissionError: if the Hub refuses the token, or it may not write there.
        ConnectionError: if the Hub cannot be reached, or the connection breaks. Push again.
    """
    validate_dataset(trajectories, preferences)
    files = _files_of(repo_id, Path(trajectories), None if preferences is None else Path(preferences), license)
    api = HfApi(token=token)
    with _explained(repo_id, token):
        api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        head = api.dataset_info(repo_id).sha
        changes = _changes(api, repo_id, head, files)
        if not changes:
            return head
        # `create_commit`, as `upload_folder` may make several commits with Xet; with its parent, so that nothing which
        # somebody else pushed since we looked is overwritten
        commit = api.create_commit(
            repo_id, changes, repo_type="dataset", commit_message="Push dataset with trl-stare", parent_commit=head
        )
    return commit.oid


def download_dataset(
    repo_id: str, *, revision: str = "main", token: str | None = None, cache_dir: str | Path | None = None
) -> Path:
    """Fetch what [`push_dataset`] pushed, and compare every file's hash with the Hub's.

    `hf_hub_download` looks at sizes only: over plain HTTP it takes a file of equal size with other bytes, and keeps it.
    With `HF_HUB_OFFLINE=1` what was downloaded before is returned as it is.

    Args:
        repo_id (`str`): `"user/name"`.
        revision (`str`): branch, tag or commit.
        token (`str`, *optional*): by default the one of `hf auth login` or `HF_TOKEN`.
        cache_dir (`str` or `Path`, *optional*): by default the Hub's cache.

    Returns:
        a folder in the cache, with the folders `trajectories` and, if there are pairs, `preferences`.

    Raises:
        FileNotFoundError: if there is no such repository or revision, or it holds no trajectories.
        PermissionError: if the Hub refuses the token, or it may not read there.
        ConnectionError: if the Hub cannot be reached, or the connection breaks.
        OSError: if a file is damaged; it is then removed from the cache.

    Example:
        `load_trajectories(download_dataset("user/stack") / "trajectories")`
    """
    api = HfApi(token=token)
    wanted = [f"{TRAJECTORIES}/*.parquet", f"{PREFERENCES}/*.parquet", YIELD]
    with _explained(repo_id, token, revision):
        folder = Path(
            api.snapshot_download(
                repo_id, repo_type="dataset", revision=revision, cache_dir=cache_dir, allow_patterns=wanted
            )
        )
        if not any(folder.glob(wanted[0])):
            raise FileNotFoundError(
                f"`repo_id` must hold {wanted[0]}, got {repo_id!r} without. Use `push_dataset` first."
            )
        if not constants.HF_HUB_OFFLINE:
            _check_hashes(api, repo_id, folder, cache_dir)
    return folder


def find_dataset(
    trajectories: str | Path,
    preferences: str | Path | None = None,
    *,
    revision: str = "main",
    token: str | None = None,
) -> tuple[Path, Path | None]:
    """The folders of a dataset that is given by folders, or by the name of its repository on the Hub.

    Args:
        trajectories (`str` or `Path`): a folder of [`save_trajectories`], or a repository of [`push_dataset`],
            `"user/name"`, which is then downloaded. A folder that exists comes first.
        preferences (`str` or `Path`, *optional*): a folder of [`save_pairs`]; by default the repository's.
        revision (`str`): branch, tag or commit of the repository.
        token (`str`, *optional*): by default the one of `hf auth login` or `HF_TOKEN`.

    Returns:
        the folders of trajectories and pairs; `None` in place of the latter where there are none.

    Raises:
        FileNotFoundError: if `trajectories` is neither, or `preferences` is no folder.
        OSError: what [`download_dataset`] raises.

    Example:
        `find_dataset("data/rollouts")` is `(Path("data/rollouts"), None)` where there is such a folder.
    """
    if preferences is not None and not Path(preferences).is_dir():
        raise FileNotFoundError(
            f"`preferences` must be a folder, got {str(preferences)!r}. Make it by recipes/pairs.py."
        )
    given = None if preferences is None else Path(preferences)
    if Path(trajectories).is_dir():
        return Path(trajectories), given
    try:
        validate_repo_id(str(trajectories))
        folder = download_dataset(str(trajectories), revision=revision, token=token)
    except (HFValidationError, FileNotFoundError, PermissionError, ConnectionError) as error:
        # without a token the Hub does not tell what is missing from what is private
        kind = next(
            (kind for kind in (PermissionError, ConnectionError) if isinstance(error, kind)), FileNotFoundError
        )
        raise kind(
            f"`trajectories` must be a folder or a repository on the Hub, got {str(trajectories)!r}: {error}"
        ) from error
    pairs = folder / PREFERENCES
    return folder / TRAJECTORIES, given or (pairs if pairs.is_dir() else None)


def _files_of(
    repo_id: str, trajectories: Path, preferences: Path | None, license: str
) -> dict[str, CommitOperationAdd]:
    """Path in the repository -> the file."""
    contents: dict[str, Path | bytes] = {f"{TRAJECTORIES}/{file.name}": file for file in parquet_files(trajectories)}
    yield_table = None
    if preferences is not None:
        contents |= {f"{PREFERENCES}/{file.name}": file for file in parquet_files(preferences)}
        yield_table = load_yield(preferences)
    if yield_table is not None:
        contents[YIELD] = yield_file(preferences)
    card = render_dataset_card(
        repo_id, trajectories, preferences, yield_table=yield_table, picture=PICTURE, license=license
    )
    contents |= {PICTURE: stage_strip(trajectories), "README.md": card.encode()}
    return {path: CommitOperationAdd(path_in_repo=path, path_or_fileobj=content) for path, content in contents.items()}


def _changes(
    api: HfApi, repo_id: str, revision: str, files: Mapping[str, CommitOperationAdd]
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """What makes the repository at `revision` hold `files`, and no other data than these."""
    tree = api.list_repo_tree(repo_id, repo_type="dataset", revision=revision, recursive=True)
    there = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    new = [file for path, file in files.items() if path not in there or not _is_same(file, there[path])]
    ours = (f"{TRAJECTORIES}/", f"{PREFERENCES}/")
    old = [
        path
        for path in there.keys() - files.keys()
        if path == YIELD or (path.startswith(ours) and path.endswith(".parquet"))
    ]
    return [*new, *(CommitOperationDelete(path_in_repo=path) for path in old)]


def _is_same(file: CommitOperationAdd, entry: RepoFile) -> bool:
    """By content: the SHA-256 of a file in LFS or Xet, git's blob id of others
    (https://git-scm.com/book/en/v2/Git-Internals-Git-Objects)."""
    if file.upload_info.size != entry.size:
        return False
    if entry.lfs is not None:
        return file.upload_info.sha256.hex() == entry.lfs.sha256
    with file.as_file() as stream:
        content = stream.read()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == entry.blob_id


def _check_hashes(api: HfApi, repo_id: str, folder: Path, cache_dir: str | Path | None) -> None:
    """Raise `OSError` if a file of the snapshot `folder`, which is named after its commit, is not what the Hub has."""
    result = api.verify_repo_checksums(repo_id, repo_type="dataset", revision=folder.name, cache_dir=cache_dir)
    damaged = [mismatch["path"] for mismatch in result.mismatches]
    for path in damaged:
        # a snapshot links to its blobs; where the system has no links, it holds the files themselves
        blob = (folder / path).resolve()
        (folder / path).unlink()
        blob.unlink(missing_ok=True)
    if damaged:
        raise OSError(
            f"files of `{repo_id}` must have the Hub's checksums, got others in {', '.join(damaged)}: damaged on the way. "
            "They were removed from the cache. Download again."
        )


@contextmanager
def _explained(repo_id: str, token: str | None, revision: str = "main") -> Iterator[None]:
    """Turn the Hub's refusals into errors that say which token or which repository, never the token itself."""
    try:
        yield
    except HfHubHTTPError as error:
        explained = _explain(error, repo_id, _source_of(token), revision)
        if explained is None:
            raise
        raise explained from error
    except HTTPError as error:  # of the transport: no connection, or it broke
        raise ConnectionError(
            f"the connection to {constants.ENDPOINT} failed ({type(error).__name__}: {error}). Do the same again: what has "
            "arrived is not sent twice, and nothing half done can be seen."
        ) from error


def _explain(error: HfHubHTTPError, repo_id: str, source: str, revision: str) -> OSError | None:
    status = error.response.status_code
    if status == 401:
        return PermissionError(
            f"the Hub must know who asks for `{repo_id}`, got {source}, which it does not accept (401). Log in with "
            "`hf auth login`, or set `HF_TOKEN`."
        )
    if status == 403:
        return PermissionError(
            f"the Hub must allow this for `{repo_id}`, got {source}, which has no right to (403). Use a token with write "
            "access, or another namespace."
        )
    if status == 404:
        return FileNotFoundError(
            f"`repo_id` must be a dataset repository with the revision {revision!r}, got {repo_id!r}, of which the Hub "
            f"knows none (404), or none that {source} may see. Check the names."
        )
    if status == 412:
        return ConnectionError(f"somebody else pushed to `{repo_id}` at the same time (412). Push again.")
    return None


def _source_of(token: str | None) -> str:
    """Where the token comes from, in words."""
    if token is not None:
        return "the token given as `token`"
    if get_token() is None:
        return "no token"
    variables = [name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name)]
    return f"the token in the variable `{variables[0]}`" if variables else f"the token in {constants.HF_TOKEN_PATH}"
