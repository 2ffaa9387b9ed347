import pytest

from taildropout.shipping.files import written_whole


def write(path, text):
    with written_whole(path) as temporary:
        temporary.write_text(text)


def fail_while_writing(path, error=RuntimeError):
    with written_whole(path) as temporary:
        temporary.write_text("half")
        raise error("full disk")


@pytest.mark.parametrize("before", [None, "old"])
def test_a_file_appears_whole(tmp_path, before):
    path = tmp_path / "note.txt"
    if before is not None:
        path.write_text(before)
    write(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError, OSError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_nothing(tmp_path, error):
    with pytest.raises(error, match="full disk"):
        fail_while_writing(tmp_path / "note.txt", error)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_what_was_there(tmp_path):
    path = tmp_path / "note.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="full disk"):
        fail_while_writing(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_is_not_there_before_it_is_whole(tmp_path):
    path = tmp_path / "picture.png"
    with written_whole(path) as temporary:
        temporary.write_text("half")
        assert temporary.suffix == ".png"
        assert not path.exists()
    assert path.exists()


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "missing" / "note.txt", "new")


def test_a_block_that_writes_nothing_is_an_error_and_leaves_what_was_there(tmp_path):
    path = tmp_path / "note.txt"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), written_whole(path):
        pass
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_in_the_way_is_an_error_and_stays(tmp_path):
    (tmp_path / "note.txt").mkdir()
    with pytest.raises(OSError, match="note"):
        write(tmp_path / "note.txt", "new")
    assert [(path.name, path.is_dir()) for path in tmp_path.iterdir()] == [("note.txt", True)]


def test_a_path_may_be_a_string_and_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("note", "new")
    assert (tmp_path / "note").read_text() == "new"
