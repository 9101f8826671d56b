"""Delta_m against values worked out by hand."""

import numpy as np
import pytest

from training.files import Row
from training.study import delta_m


def rows_of(method, seed, **values):
    """Rows of {task__metric: value}."""
    return [
        Row(method, seed, *name.split("__"), value) for name, value in values.items()
    ]


def found(rows):
    return {(row.method, row.seed): row.value for row in delta_m.rows(rows)}


BASELINE = {
    "segmentation__miou": 20.0,
    "segmentation__pixel_accuracy": 50.0,
    "normals__mean_angle": 30.0,
    "depth__rmse": 0.5,
}


def test_by_hand():
    """+10 and -2 % are +4; 10 % fewer degrees are +10; 20 % more metres -20."""
    ours = rows_of(
        "cross_stitch",
        3,
        segmentation__miou=22.0,
        segmentation__pixel_accuracy=49.0,
        normals__mean_angle=27.0,
        depth__rmse=0.6,
    )
    rows = [*rows_of("single_task_longer", 3, **BASELINE), *ours]

    assert delta_m.rows(rows) == [
        Row("cross_stitch", 3, "all tasks", "delta_m", -2.0)  # (4 + 10 - 20) / 3
    ]


def test_a_metric_more_does_not_give_a_task_more_weight():
    """Nor does a count, or the score of a class."""
    before, after = {"a__miou": 10.0}, {"a__miou": 20.0}  # +100
    for name in ("mean_angle", "median_angle", "within_30"):
        before[f"b__{name}"] = after[f"b__{name}"] = 5.0  # 0
    before |= {"a__pixels": 5.0, "a__iou/lamp": 1.0}
    after |= {"a__pixels": 9.0, "a__iou/lamp": 9.0}
    rows = [
        *rows_of("single_task_as_long", 0, **before),
        *rows_of("hard_sharing", 0, **after),
    ]

    assert found(rows) == {("hard_sharing", 0): 50.0}


def test_each_method_is_against_its_own_baseline_and_seed():
    rng = np.random.default_rng(0)
    rows, expected = [], {}
    for method, of in (
        ("cross_stitch@same_task=0.5", "single_task_longer"),
        ("split@conv4", "single_task_as_long"),
        ("ensemble", "single_task"),
        ("hard_sharing@epochs=8", "single_task_as_long@epochs=8"),
    ):
        for seed in range(3):
            theirs, ours = rng.uniform(10, 60, (2, 2))
            rows += rows_of(of, seed, a__miou=theirs[0], b__mean_angle=theirs[1])
            rows += rows_of(method, seed, a__miou=ours[0], b__mean_angle=ours[1])
            change = (ours - theirs) / theirs * (1, -1)
            expected[method, seed] = pytest.approx(100 * change.mean(), abs=6e-4)

    assert found(rows) == expected


def test_without_a_baseline_of_numbers_a_run_has_none():
    rows = [
        *rows_of("single_task_longer", 0, a__miou=10.0),
        *rows_of("single_task_longer", 1, a__miou=0.0),  # nothing is relative to it
        *rows_of("single_task_longer", 2, a__miou=10.0),
        *(x for seed in (1, 7) for x in rows_of("cross_stitch", seed, a__miou=11.0)),
        *rows_of("cross_stitch", 2, a__miou=11.0, b__rmse=1.0),
        *rows_of("single_task_longer", 4, a__miou=np.nan),
        *rows_of("cross_stitch", 4, a__miou=11.0),
        *rows_of("single_task_longer", 3, a__miou=10.0, b__mean_angle=np.nan),
        *rows_of("cross_stitch", 3, a__miou=11.0, b__mean_angle=np.nan),
    ]

    assert found(rows) == {}
