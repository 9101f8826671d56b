import itertools
import os

import numpy as np
import pytest
from scipy.stats import ttest_rel

from training.files import Row, write_csv
from training.provenance import Made
from training.study.results import (
    holm,
    paired_difference,
    read_rows,
    statistics,
)
from training.study.tables import brief, markdown

HEADER = (*Row._fields, *Made._fields)


def rows_of(values, metric="miou", task="segmentation"):
    """Rows of {method: values by seed}."""
    return [
        Row(method, seed, task, metric, value)
        for method, of_seeds in values.items()
        for seed, value in enumerate(of_seeds)
    ]


def cells(values, metric="miou"):
    """{method: the cell}."""
    (table,) = statistics(rows_of(values, metric))
    return {method: cell for method, (cell,) in table.cells.items()}


@pytest.mark.parametrize("seeds", [2, 3, 5, 11])
def test_the_paired_difference_is_that_of_the_paired_t_test(seeds):
    ours, theirs = np.random.default_rng(seeds).normal(20, 1, (2, seeds))
    test = ttest_rel(ours, theirs)
    expected = test.confidence_interval(0.95)

    known = paired_difference(dict(enumerate(ours)), dict(enumerate(theirs)))

    assert known.mean == pytest.approx(np.mean(ours) - np.mean(theirs))
    assert (known.low, known.high) == pytest.approx((expected.low, expected.high))
    assert known.seeds == seeds
    assert known.p == pytest.approx(test.pvalue)


def test_only_seeds_of_both_are_paired():
    ours = {0: 5.0, 1: 6.0, 7: 8.0, 9: 100.0}
    theirs = {9: 99.0, 0: 1.0, 2: -50.0, 7: 7.0}

    known = paired_difference(ours, theirs)

    assert known.seeds == 3
    assert known.mean == pytest.approx((4 + 1 + 1) / 3)
    assert paired_difference({0: 1.0, 1: 2.0}, {1: 0.0, 2: 0.0}) is None


def test_mean_and_deviation_are_those_of_the_sample():
    values = np.random.default_rng(0).normal(20, 1, 5)

    cell = cells({"single_task": values})["single_task"]

    assert cell.mean == pytest.approx(values.sum() / 5)
    squares = ((values - values.mean()) ** 2).sum()
    assert cell.deviation == pytest.approx((squares / 4) ** 0.5)
    assert cell.seeds == 5


def test_one_seed_has_neither_deviation_nor_interval_nor_mark():
    cell = cells({"single_task_longer": [20.0], "cross_stitch": [29.0]})["cross_stitch"]

    assert (cell.deviation, cell.difference, cell.best) == (None, None, False)
    assert (cell.value, cell.gain) == ("29.0", "")


@pytest.mark.parametrize(
    ("metric", "ours", "marked"),
    [
        ("miou", [21.0, 22.1, 23.0], True),
        ("miou", [19.0, 20.1, 21.0], False),  # worse
        ("miou", [21.0, 22.0, 22.0], False),  # perhaps by chance
        ("mean_angle", [19.0, 20.1, 21.0], True),
        ("mean_angle", [21.0, 22.1, 23.0], False),
        ("pixels", [21.0, 22.1, 23.0], False),  # neither is better
    ],
)
def test_the_best_is_marked_where_its_interval_excludes_zero(metric, ours, marked):
    known = cells({"single_task_longer": [20, 21, 22], "cross_stitch": ours}, metric)

    assert known["cross_stitch"].best is marked
    assert not known["single_task_longer"].best


def test_what_is_neither_better_nor_worse_is_not_compared():
    """Nor does it count among the differences that are told apart from chance."""
    names = ("single_task_as_long", "hard_sharing", "cross_stitch_from_start")
    values = {name: [20 + k, 21 + k, 22.1 + k] for k, name in enumerate(names)}
    (table,) = statistics(rows_of(values, "pixels"))

    assert (table.baselines, table.rivals) == ({}, {})


def test_equal_values_differ_by_nothing_and_equal_differences_are_certain():
    def of(*ours):
        values = {"single_task_longer": [20, 21, 22], "cross_stitch": ours}
        return cells(values)["cross_stitch"]

    same, moved = of(20, 21, 22), of(21, 22, 23)
    assert (same.difference.p, same.certain) == (1, False)
    assert (moved.difference.p, moved.certain) == (0, True)


def test_a_method_that_another_one_beats_is_not_marked():
    values = {
        "single_task_longer": [20, 21, 22],
        "cross_stitch": [21, 22.1, 23],
        "cross_stitch@same_task=0.5": [22, 23.1, 24],
    }

    marked = [method for method, cell in cells(values).items() if cell.best]

    assert marked == ["cross_stitch@same_task=0.5"]


def test_a_method_that_does_not_differ_from_another_is_not_marked():
    values = {
        "single_task_longer": [20, 21, 22],
        "cross_stitch": [22, 23.1, 24],
        "cross_stitch@same_task=0.5": [22.1, 22.9, 24.1],
    }

    known = cells(values)

    assert not any(cell.best for cell in known.values())
    assert known["cross_stitch"].certain


def test_more_epochs_are_compared_with_as_many():
    """Though the baseline of fewer is there, too, and has lower values."""
    longer = {
        "single_task_longer@epochs=8": [23, 24, 25.1],
        "cross_stitch@epochs=8,same_task=0.5": [22, 23, 24],
    }
    values = {"single_task_longer": [20, 21, 22], "cross_stitch": [21, 22, 23.1]}
    tables = statistics(rows_of(values | longer))
    known = {method: cell for method, (cell,) in tables[0].cells.items()}

    assert known["cross_stitch"].difference.mean == pytest.approx(1, abs=0.04)
    of_longer = known["cross_stitch@epochs=8,same_task=0.5"]
    assert of_longer.difference.mean == pytest.approx(-1, abs=0.04)
    assert not of_longer.best
    note = (
        "(cross-stitch against single-task, trained on; cross-stitch against "
        "single-task, trained on, epochs 8)"
    )
    assert note in markdown(tables)


def test_a_value_that_is_none_makes_nothing_certain():
    p_values = {"a": 0.001, "b": np.nan, "c": 0.02, "d": 0.024}
    for order in itertools.permutations(p_values):
        assert holm({x: p_values[x] for x in order}) == {"a"}
    known = cells(
        {"single_task_longer": [20, 21, 22.5], "cross_stitch": [21, 22, np.nan]}
    )
    assert not known["cross_stitch"].certain


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_holms_correction_is_that_of_statsmodels(count):
    """Against its adjusted p-values: the largest of (n - k) p_k so far."""
    rng = np.random.default_rng(count)
    p_values = dict(enumerate(rng.uniform(0, 4 / count, count) ** 3))
    ordered = sorted(p_values, key=p_values.get)
    adjusted = np.maximum.accumulate(
        [(count - k) * p_values[x] for k, x in enumerate(ordered)]
    )

    expected = {x for x, p in zip(ordered, adjusted, strict=True) if p <= 0.05}

    assert holm(p_values) == expected


def test_what_is_certain_alone_may_not_be_so_among_many():
    """Of twenty methods that differ from their baseline by chance, some by 5 %."""
    rng = np.random.default_rng(0)
    chance = {
        f"cross_stitch@same_task={k}": rng.normal(20, 1, 5).tolist() for k in range(99)
    }
    known = cells({"single_task_longer": rng.normal(20, 1, 5).tolist(), **chance})
    differences = [cell.difference for cell in known.values() if cell.difference]

    assert sum(x.p < 0.05 for x in differences) > 2
    assert not any(cell.certain or cell.best for cell in known.values())


def test_delta_m_is_the_last_column_and_compared_with_zero():
    rows = [
        *rows_of({"single_task_longer": [20, 21], "cross_stitch": [22, 23]}),
        *rows_of({"cross_stitch": [1.5, 2.5]}, "delta_m", "all tasks"),
    ]

    (table,) = statistics(rows)

    assert table.metrics == ["miou", "delta_m"]
    assert table.cells["single_task_longer"][1] is None
    cell = table.cells["cross_stitch"][1]
    assert (cell.value, cell.difference.mean) == ("+2.00 ± 0.71", 2)
    assert cell.gain == "(-4.35 to +8.35)"


def test_metres_have_the_digits_that_they_need():
    known = cells(
        {"single_task_longer": [0.512, 0.534], "cross_stitch": [0.5, 0.53]}, "rmse"
    )
    alone = cells({"single_task": [0.51249]}, "rel_error")["single_task"]

    assert known["cross_stitch"].value == "0.5150 ± 0.0212"
    assert known["cross_stitch"].gain.startswith("-0.0080 (")
    assert alone.value == "0.512"


def test_a_method_with_the_best_mean_and_worse_pairs_is_not_marked():
    (table,) = statistics(
        [
            *rows_of({"single_task_longer": [20, 21, 22]}),
            *rows_of({"cross_stitch": [19, 20.1, 21, 100]}),  # a seed of its own
        ]
    )

    (cell,) = table.cells["cross_stitch"]
    assert cell.mean > 21
    assert cell.difference.high < 0
    assert not cell.best


def test_a_method_that_another_one_beats_on_the_same_seeds_is_not_marked():
    """Its mean is the best by seeds that the other has not been trained with."""
    luck = np.arange(10.0)
    values = {
        "single_task_as_long": 40 + 3 * luck,
        "hard_sharing": 42 + 3 * luck + 0.01 * (luck % 2),
        "cross_stitch_from_start": 45 + 3 * luck[:3] + 0.01 * (luck[:3] % 3),
    }

    known = cells(values)

    assert known["hard_sharing"].mean > known["cross_stitch_from_start"].mean
    assert known["hard_sharing"].certain
    assert not any(cell.best for cell in known.values())


@pytest.mark.parametrize(
    ("method", "baseline"),
    [
        ("ensemble", "single_task"),
        ("hard_sharing", "single_task_as_long"),
        ("split@conv4", "single_task_as_long"),
        ("cross_stitch@alpha_multiplier=10", "single_task_longer"),
        ("cross_stitch_from_start", "single_task_as_long"),
        ("nddr", "single_task_longer"),
        ("nddr_from_start", "single_task_as_long"),
    ],
)
def test_each_method_is_compared_with_its_own_baseline(method, baseline):
    names = ("single_task", "single_task_longer", "single_task_as_long")
    values = {name: [i, i + 1.0] for i, name in enumerate(names)}

    known = cells(values | {method: [10.0, 11.1]})[method]

    assert known.difference.mean == pytest.approx(10.05 - names.index(baseline))


def test_raw_values_are_read_as_they_were_written(tmp_path):
    rng = np.random.default_rng(0)
    written = [
        (
            Row(method, seed, task, "miou", float(rng.normal())),
            Made(
                "digest", "float32", "data", "commit", f"keras={seed}, numpy=2", "x86"
            ),
        )
        for method, seed, task in itertools.product(("a@b=1,c=2", "d"), (0, 9), "xy")
    ]
    path = tmp_path / "new" / "methods.csv"
    write_csv(path, HEADER, ((*row, *made) for row, made in written))

    assert read_rows(path) == written
    first, second = path.read_text().split("\n")[:2]
    assert first == ",".join(HEADER)
    assert second.startswith('"a@b=1,c=2",0,x,miou,')


def test_a_write_that_is_stopped_leaves_the_file(tmp_path, monkeypatch):
    path = tmp_path / "methods.csv"
    write_csv(path, Row._fields, rows_of({"single_task": [1.0]}))
    before = path.read_text()

    def stop(*names):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write_csv(path, Row._fields, rows_of({"single_task": [2.0]}))

    assert path.read_text() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method,seed\na,1\n", "Expected the columns method,seed,.*,value,recipe"),
        (f"{','.join(HEADER)}\na,0,b,c,d\n", r"line 2: could not convert"),
        (f"{','.join(HEADER)}\na,0,b\n", "line 2"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, text, message):
    (tmp_path / "methods.csv").write_text(text)

    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / "methods.csv")


def test_a_value_that_stands_twice_is_refused():
    with pytest.raises(
        ValueError, match="single_task, seed 0, has segmentation miou tw"
    ):
        statistics(2 * rows_of({"single_task": [1.0]}))


def test_a_metric_of_unknown_direction_is_refused():
    with pytest.raises(
        ValueError, match="whether a higher 'loss' is better: add it to"
    ):
        statistics(rows_of({"single_task": [1.0]}, metric="loss"))


def test_cross_stitch_is_paired_with_the_control_that_shares_nothing():
    values = {
        "single_task_as_long": [20, 21, 22],
        "own_maps_from_start": [21, 21.5, 23],
        "cross_stitch_from_start": [22, 23.5, 25],
    }
    (table,) = statistics(rows_of(values))

    ((pair, (cell,)),) = table.rivals.items()
    assert pair == ("cross_stitch_from_start", "own_maps_from_start")
    assert cell.mean == pytest.approx(5 / 3)
    assert table.baselines["own_maps_from_start"] == "single_task_as_long"


def test_cross_stitch_is_paired_with_hard_sharing():
    random = np.random.default_rng(0)
    with_option = "@loss_weighting=uncertainty"
    values = {
        "single_task_as_long": random.normal(20, 1, 4),
        f"hard_sharing{with_option}": random.normal(21, 1, 4),
        "hard_sharing": random.normal(21, 1, 4),
        "cross_stitch_from_start": random.normal(23, 1, 4),
    }
    (table,) = statistics(rows_of(values))
    ((pair, (cell,)),) = table.rivals.items()

    assert pair == ("cross_stitch_from_start", "hard_sharing")
    ours, theirs = (values[method] for method in reversed(pair))
    assert cell.mean == pytest.approx(np.mean(theirs - ours))
    assert cell.difference.p == pytest.approx(ttest_rel(theirs, ours).pvalue)


def test_the_pair_counts_among_what_is_certain():
    """Alone it would be; of five differences together it is not."""
    apart = np.array([0.9, 1.0, 1.1, 1.35])
    values = {
        "single_task_as_long": np.array([20.0, 24, 19, 22]),
        "hard_sharing": np.array([21.0, 20, 22, 23]),
    }
    values["cross_stitch_from_start"] = values["hard_sharing"] + apart
    (table,) = statistics(rows_of(values))
    ((alone,),) = table.rivals.values()
    assert alone.certain
    others = {f"split@x{n}": values["hard_sharing"] for n in range(40)}
    (table,) = statistics(rows_of({**values, **others}))
    ((among,),) = table.rivals.values()
    assert not among.certain


def test_what_one_task_lacks_is_left_out_of_its_table_and_empty_in_the_brief_one():
    both = {"hard_sharing": [1.0, 2.0], "cross_stitch_from_start": [2.0, 2.5]}
    alone = {"cross_stitch_from_start": [2.0, 2.5]}
    normals, segmentation = statistics(
        rows_of(alone, "mean_angle", "normals") + rows_of(both)
    )
    assert [cell.seeds for (cell,) in segmentation.rivals.values()] == [2]
    assert not normals.rivals
    assert list(normals.cells) == ["cross_stitch_from_start"]
    rows = [
        line.split("|")[1:-1] for line in brief([normals, segmentation]).split("\n")
    ]
    of = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows if row}
    assert of["hard sharing"] == ["2", "", "1.50 ± 0.71", ""]
    pair = of["cross-stitch from the start minus hard sharing"]
    assert (pair[0], pair[1], pair[3]) == ("2", "", "")
    assert pair[2].startswith("+0.75")
