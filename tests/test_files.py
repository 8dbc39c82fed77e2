"""Files that are written whole, and known by what is in them."""

import pytest

from trl_stare.files import dataset_digest, file_digest, write_atomically


def test_writing_replaces_a_file_as_a_whole(tmp_path):
    path = tmp_path / "new" / "x.txt"
    write_atomically(path, "one")
    write_atomically(path, "two")
    assert path.read_text() == "two" and list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "x.txt"
    path.mkdir()  # no file can take a folder's place
    with pytest.raises(IsADirectoryError):
        write_atomically(path, "new")
    assert list(tmp_path.iterdir()) == [path] and path.is_dir()


def test_a_digest_is_what_sha256sum_prints(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")  # the example of FIPS 180-2, appendix B.1
    assert file_digest(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_dataset_is_its_parquet_files_wherever_it_lies(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "part").mkdir(parents=True)
        (tmp_path / name / "part" / "0.parquet").write_bytes(b"rows")
        (tmp_path / name / f"note-{name}.txt").write_text(name)
    digest = dataset_digest(tmp_path / "a")
    assert digest == dataset_digest(tmp_path / "b") != dataset_digest(tmp_path / "b" / "part")
    (tmp_path / "b" / "part" / "1.parquet").write_bytes(b"")
    assert dataset_digest(tmp_path / "b") != digest
    (tmp_path / "a" / "part" / "0.parquet").write_bytes(b"rowS")
    assert dataset_digest(tmp_path / "a") != digest
