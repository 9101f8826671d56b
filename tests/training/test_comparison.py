import os

import matplotlib.image
import pytest

from training import comparison

TASKS = ("segmentation", "normals")


def test_a_comparison_is_pictures_and_a_model_that_is_exported_once(
    finished, cross_stitch, monkeypatch
):
    monkeypatch.setattr(
        comparison,
        "export_saved_model",
        lambda model, directory, version: (directory / str(version)).mkdir(
            parents=True
        ),
    )

    def compare():
        return comparison.compare(finished, ["single_task", "cross_stitch"], 0)

    target = compare()
    pictures = [finished.runs / f"tiny/gallery/{task}_seed0.png" for task in TASKS]
    for path in (*pictures, target / "alpha.png"):
        picture = matplotlib.image.imread(path)
        assert picture.shape[0] > 300
        assert picture.std() > 0.1
    exported = target / "serving/1"
    before = exported.stat().st_mtime_ns
    compare()
    assert exported.stat().st_mtime_ns == before
    os.utime(exported, (0, 0))  # as if the model had been trained after it
    compare()
    assert exported.stat().st_mtime_ns > before


def test_an_export_that_is_stopped_leaves_no_part_of_a_model(tmp_path, monkeypatch):
    """TensorFlow Serving reads whatever has a number for its name."""
    stops = []

    def export(model, directory, version):
        if stops:
            raise KeyboardInterrupt
        (directory / str(version) / model).mkdir(parents=True)

    monkeypatch.setattr(comparison, "export_saved_model", export)
    trained = tmp_path / "model.keras"
    trained.touch()
    comparison._export("old", trained, tmp_path)
    os.utime(tmp_path / "1", (0, 0))
    stops.append(True)
    with pytest.raises(KeyboardInterrupt):
        comparison._export("new", trained, tmp_path)
    assert not (tmp_path / "1").exists()
    stops.clear()
    comparison._export("new", trained, tmp_path)
    assert [path.name for path in (tmp_path / "1").iterdir()] == ["new"]
    assert not (tmp_path / ".outdated").exists()


def test_the_table_has_a_row_a_metric_and_a_column_a_method(finished, cross_stitch):
    header, body = comparison.rows(finished, ["single_task", "cross_stitch"], 0)

    assert header == ["", "single-task", "cross-stitch"]
    assert len(body) == 8
    assert {len(row) for row in body} == {3}
