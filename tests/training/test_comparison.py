import os

import matplotlib.image

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
        return comparison.compare(finished, ["one_task", "cross_stitch"], 0)

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


def test_the_table_has_a_row_a_metric_and_a_column_a_method(finished, cross_stitch):
    header, body = comparison.rows(finished, ["one_task", "cross_stitch"], 0)

    assert header == ["", "one task", "cross stitch"]
    assert len(body) == 8
    assert {len(row) for row in body} == {3}
