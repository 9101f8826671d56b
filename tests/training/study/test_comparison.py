import dataclasses
import os
import shutil

import keras
import matplotlib.image
import numpy as np
import pytest

from training import runs
from training.files import Row, write_csv
from training.locks import lock
from training.provenance import Made
from training.study import comparison
from training.tasks import Depth

pytestmark = pytest.mark.xdist_group("tiny")

TASKS = ("segmentation", "normals")


def test_a_comparison_is_pictures_and_a_model_that_is_exported_once(
    finished, cross_stitch, monkeypatch
):
    def export(model, directory, version, finish, **more):
        (directory / str(version)).mkdir(parents=True)
        finish(directory / str(version), {})

    monkeypatch.setattr(comparison, "export_saved_model", export)

    def compare():
        return comparison.compare(finished, ["single_task", "cross_stitch"], 0)

    _, target = compare()
    pictures = [finished.runs / f"tiny/gallery/{task}_seed0.png" for task in TASKS]
    for path in (*pictures, target / "alpha.png"):
        picture = matplotlib.image.imread(path)
        assert picture.shape[0] > 300
        assert picture.std() > 0.1
    exported = target / "serving/1"
    before = exported.stat().st_mtime_ns
    compare()
    assert exported.stat().st_mtime_ns == before
    # Without units there is nothing to say of the SavedModel.
    assert comparison.compare(finished, ["single_task"], 0) is None
    assert exported.stat().st_mtime_ns == before
    (exported / "assets.extra/made_of.json").unlink()  # as it was exported before
    compare()
    assert exported.stat().st_mtime_ns > before


def test_what_is_exported_is_of_the_last_method_that_has_units(
    finished, cross_stitch, monkeypatch
):
    titles, exported = [], []
    monkeypatch.setattr(comparison, "_save", lambda figure, path, dpi: None)
    monkeypatch.setattr(
        comparison.figures, "gallery", lambda columns, scale: titles.append([*columns])
    )
    monkeypatch.setattr(
        comparison, "_export", lambda model, trained, _: exported.append(trained)
    )
    method, _ = comparison.compare(finished, ["cross_stitch", "single_task"], 0)

    assert method == "cross_stitch"
    assert exported == [cross_stitch / "model.keras"]
    assert titles[0][2:] == ["cross-stitch", "single-task", "change, first to last"]


def test_the_change_is_from_the_first_method_to_the_last(monkeypatch):
    compared = []
    monkeypatch.setattr(
        comparison.figures, "difference", lambda *three: compared.append(three)
    )
    metres = [np.full((1, 1, 1), x) for x in (2.0, 3.0, 5.0, 9.0)]
    truth, *answers = ([x] for x in metres)
    comparison._columns(Depth(), [np.zeros((1, 1, 3))], truth, answers)

    drawn = [Depth().draw(metres[k]) for k in (0, 1, 3)]
    np.testing.assert_array_equal(compared, [drawn])


def test_of_two_comparisons_of_a_seed_one_waits(finished, cross_stitch, monkeypatch):
    """Each would remove what the other has just written."""

    def export(model, trained, directory):
        with (
            pytest.raises(ValueError, match="is being written by process"),
            lock(directory.parent / ".lock", wait=False),
        ):
            pass

    monkeypatch.setattr(comparison, "_export", export)

    assert comparison.compare(finished, ["cross_stitch"], 0)


def test_the_legend_is_of_what_the_table_shows():
    body = [["segmentation", ""], ["  mIoU, % ↑", "3.9"]]

    assert comparison.legend(body) == "↑: higher is better"
    more = [*body, ["  mean angle, degrees ↓", "9.0 (8.0…9.5)"], ["Δm, % ↑", "+1.0"]]
    for words in ("↓: lower", "in brackets: where 95 %", "Δm: the mean over tasks"):
        assert words in comparison.legend(more)


def test_a_savedmodel_of_another_method_is_not_taken_for_this_one(
    tmp_path, monkeypatch
):
    """Though it is newer: all methods of a seed have one folder."""
    exports = []

    def export(model, directory, version, from_jpeg, finish):
        exports.append(model.name)
        (directory / "1").mkdir()
        finish(directory / "1", {})

    monkeypatch.setattr(comparison, "export_saved_model", export)
    image = keras.Input((4, 4, 3))
    trained = {}
    for method in ("cross_stitch", "nddr"):
        trained[method] = tmp_path / method / "seed0" / "model.keras"
        trained[method].parent.mkdir(parents=True)
        (trained[method].parent / "answers.json").write_text("{}")
        trained[method].write_text(method)
        os.utime(trained[method], (0, 0))
    for method in ("cross_stitch", "cross_stitch", "nddr", "nddr", "cross_stitch"):
        model = keras.Model(image, image, name=method)
        comparison._export(model, trained[method], tmp_path)
    trained["cross_stitch"].write_text("trained anew")
    comparison._export(model, trained["cross_stitch"], tmp_path)

    assert exports == ["cross_stitch", "nddr", "cross_stitch", "cross_stitch"]


def test_an_export_that_is_stopped_leaves_no_part_of_a_model(tmp_path, monkeypatch):
    """TensorFlow Serving reads whatever has a number for its name."""
    stops = []

    def export(model, directory, version, from_jpeg, finish):
        if stops:
            raise KeyboardInterrupt
        (directory / str(version) / model.name).mkdir(parents=True)
        finish(directory / str(version), {})

    monkeypatch.setattr(comparison, "export_saved_model", export)
    trained = tmp_path / "model.keras"
    trained.touch()
    (tmp_path / "answers.json").write_text("{}")
    image = keras.Input((4, 4, 3))
    old, new = (keras.Model(image, image, name=name) for name in ("old", "new"))
    comparison._export(old, trained, tmp_path)
    trained.write_text("trained anew")
    stops.append(True)
    with pytest.raises(KeyboardInterrupt):
        comparison._export(new, trained, tmp_path)
    assert not (tmp_path / "1").exists()
    stops.clear()
    comparison._export(new, trained, tmp_path)
    assert (tmp_path / "1/new").exists()
    assert not (tmp_path / "1/old").exists()
    assert (tmp_path / "1/assets.extra/answers.json").read_text() == "{}"
    assert not (tmp_path / ".outdated").exists()


def test_the_table_has_a_row_a_metric_and_a_column_a_method(finished, cross_stitch):
    header, body = comparison.table(finished, ["single_task", "cross_stitch"], 0)

    assert header == ["", "single-task", "cross-stitch"]
    assert len(body) == 2 + 8 + 3
    assert [row[0] for row in body[:5]] == [
        "segmentation",
        "  pixel accuracy, % ↑",
        "  mIoU, % ↑",
        "  fwIoU, % ↑",
        "normals",
    ]
    assert {len(row) for row in body} == {3}
    costs = {name: values for name, *values in body[-3:]}
    one, stitched = map(float, costs["parameters, million"])
    assert 0 < one <= stitched
    once, twice = map(float, costs["trained, minutes"])
    assert once <= twice  # what it starts from counts


def test_the_table_ends_in_delta_m_and_says_where_values_usually_are(
    finished, single_task, tmp_path
):
    """Of values that are published of the same recipe, and of no other."""
    miou = runs.metrics(single_task)["segmentation"]["miou"]
    experiment = dataclasses.replace(finished, runs=tmp_path)
    methods = ["single_task", "ensemble"]
    for method in methods:
        shutil.copytree(single_task, experiment.folder(method, 0))

    def shown(digest):
        made = Made(recipe=digest)
        # Which have these runs in common, as two processors trained them.
        for study, first in (("demo", 20.01), ("methods", 20.0)):
            published = [
                (*Row("ensemble", seed, "segmentation", "miou", value), *made)
                for seed, value in enumerate([first, 21.0, 22.0])
            ]
            path = tmp_path / "published" / "tiny" / f"{study}.csv"
            write_csv(path, (*Row._fields, *Made._fields), published)
        _, body = comparison.table(experiment, methods, 0, tmp_path / "published")
        return {name: values for name, *values in body}

    body = shown(finished.digest)
    # 21 -+ t(2, 0.975) * 1 * sqrt(4 / 3)
    assert body["  mIoU, % ↑"] == [
        f"{miou:.1f}",
        f"{miou:.1f} (16.0…26.0)",
    ]
    assert body["Δm, % ↑"] == ["", "+0.0"]
    assert shown("another")["  mIoU, % ↑"] == 2 * [f"{miou:.1f}"]
