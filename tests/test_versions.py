"""What is a version, and which number a new one gets."""

import pytest

from keras_cross_stitch.versions import (
    check_free,
    is_complete,
    next_number,
    publish,
    versions,
)


def finished(folder, text="model"):
    folder.mkdir(parents=True)
    (folder / "saved_model.pb").write_text(text)
    return folder


def test_versions_are_the_folders_that_are_named_by_a_number(tmp_path):
    for name in ("10", "9", "007", "a", ".export-3", "1.5", "-2", "٣"):
        (tmp_path / name).mkdir()
    (tmp_path / "11").touch()
    assert list(versions(tmp_path)) == [7, 9, 10]
    assert versions(tmp_path)[7] == tmp_path / "007"
    assert versions(str(tmp_path / "away")) == {}


def test_a_version_is_complete_once_it_holds_a_saved_model(tmp_path):
    (tmp_path / "1").mkdir()
    finished(tmp_path / "2")
    complete = [n for n, path in versions(tmp_path).items() if is_complete(path)]
    assert complete == [2]


def test_the_next_number_is_above_all_that_is_there(tmp_path):
    assert next_number(tmp_path) == 1
    (tmp_path / "3").mkdir()
    (tmp_path / "5").touch()
    assert next_number(tmp_path) == 6


@pytest.mark.parametrize("name", ["4", "04"])
def test_a_number_that_is_taken_is_not_free(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=r"already has version 4.*the next one, 5"):
        check_free(tmp_path, 4)
    check_free(tmp_path, 3)


def test_of_two_exports_at_once_each_gets_a_number(tmp_path, monkeypatch):
    from keras_cross_stitch import versions as module

    mine = finished(tmp_path / ".export-a" / "model", "mine")
    known = module.next_number

    def taken_in_between(directory):
        number = known(directory)
        monkeypatch.setattr(module, "next_number", known)
        finished(tmp_path / str(number), "the other's")
        return number

    monkeypatch.setattr(module, "next_number", taken_in_between)
    path = publish(mine, tmp_path)

    assert path == tmp_path / "2"
    assert (path / "saved_model.pb").read_text() == "mine"
    assert (tmp_path / "1" / "saved_model.pb").read_text() == "the other's"


def test_a_version_that_appeared_in_between_stays(tmp_path):
    mine = finished(tmp_path / ".export-a" / "model", "mine")
    finished(tmp_path / "8", "the other's")
    with pytest.raises(ValueError, match="already has version 8"):
        publish(mine, tmp_path, 8)
    assert (tmp_path / "8" / "saved_model.pb").read_text() == "the other's"


def test_another_error_of_renaming_is_raised(tmp_path):
    with pytest.raises(FileNotFoundError):
        publish(tmp_path / "away", tmp_path)
