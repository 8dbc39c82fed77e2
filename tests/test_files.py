"""Files that are written whole, and known by what is in them."""

import pytest

from trl_stare.files import file_digest, write_atomically


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
