import os

import matplotlib.image

from training import comparison


def test_a_comparison_is_a_table_pictures_and_a_model_that_is_exported_once(
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
    tidy = (target / "metrics.csv").read_text().splitlines()
    assert tidy[0] == "method,seed,task,metric,value"
    assert len(tidy) == 1 + 2 * 8
    table = (target / "metrics.md").read_text().splitlines()
    assert table[0] == "|  | one task | cross stitch |"
    assert len(table) == 2 + 8
    for name in ("predictions.png", "alpha.png"):
        picture = matplotlib.image.imread(target / name)
        assert picture.shape[0] > 300
        assert picture.std() > 0.1
    exported = target / "serving/1"
    before = exported.stat().st_mtime_ns
    compare()
    assert exported.stat().st_mtime_ns == before
    os.utime(exported, (0, 0))  # as if the model had been trained after it
    compare()
    assert exported.stat().st_mtime_ns > before
