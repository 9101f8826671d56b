import re
import runpy
from pathlib import Path

import pytest

from training import recipes
from training.files import Row, write_csv
from training.provenance import Made
from training.study import comparison, paper
from training.study.results import statistics
from training.study.studies import STUDIES
from training.study.tables import brief, filled, markdown, update_tables

ROOT = Path(__file__).parents[3]


def rows(methods, seeds=3, task="segmentation", metrics=("miou",)):
    """Rows of {method: gain}; seeds differ by a whole point, methods by their gain."""
    return [
        Row(method, seed, task, metric, 20 + seed + gain * (1 + 0.01 * seed))
        for method, gain in methods.items()
        for seed in range(seeds)
        for metric in metrics
    ]


@pytest.fixture
def results(tmp_path):
    write_csv(
        tmp_path / "nyuv2" / "methods.csv",
        (*Row._fields, *Made._fields),
        ((*row, *Made()) for row in rows({"single_task": 0, "hard_sharing": -1})),
    )
    return tmp_path


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *(ROOT / "docs").glob("*.md")], ids=lambda x: x.name
)
def test_the_tables_are_those_of_the_raw_values(path):
    text = path.read_text()

    assert text == filled(text), f"{path.name} is not up to date: update_tables"


def test_the_figure_is_that_of_the_raw_values():
    drawing = runpy.run_path(ROOT / "docs" / "draw_label_fraction.py")

    source = f"<dc:source>{drawing['digest']()}</dc:source>"
    assert source in (ROOT / "docs" / "label_fraction.svg").read_text()


def test_a_brief_table_has_one_row_a_method_for_all_tasks():
    methods = {"single_task_as_long": 0, "hard_sharing": 1}
    known = [
        row
        for task, metrics in {
            "segmentation": ("miou", "fwiou"),
            "normals": ("mean_angle", "median_angle"),
        }.items()
        for row in rows(methods, task=task, metrics=metrics)
    ]
    known += [
        Row("hard_sharing", seed, "all tasks", "delta_m", seed) for seed in (1, 2)
    ]

    lines = brief(statistics(known)).splitlines()

    assert lines[1:5] == [
        "|  | seeds | segmentation: mIoU, % ↑ | normals: mean angle, degrees ↓ "
        "| Δm, % ↑ |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| single-task, as long | 3 | 21.00 ± 1.00 | 21.00 ± 1.00 |  |",
        "| hard sharing | 2 or 3 | +1.01 (+0.99 to +1.03) † "
        "| +1.01 (+0.99 to +1.03) † | +1.50 (-4.85 to +7.85) |",
    ]


def test_all_say_of_delta_m_what_it_is():
    """It weighs tasks alike, however many metrics they have."""
    known = [*rows({"single_task_as_long": 0, "hard_sharing": 1})]
    known.append(Row("hard_sharing", 0, "all tasks", "delta_m", 1.0))
    says = "Δm: the mean over tasks of the mean over their metrics of the change"

    for shown in (brief, markdown):
        assert f"{says} relative to the baseline" in shown(statistics(known))
    assert says in comparison.legend([["Δm, % ↑"]])


def test_a_brief_table_shows_no_value_among_differences():
    methods = {"single_task_as_long": 0, "hard_sharing": 1}
    known = [*rows(methods), *rows({"cross_stitch_from_start": 1}, seeds=1)]
    known.append(Row("cross_stitch_from_start", 0, "all tasks", "delta_m", 0.7))

    *_, last, _ = filter(None, brief(statistics(known)).splitlines())

    assert last == "| cross-stitch from the start | 1 |  | +0.7 |"


def test_a_brief_table_has_what_each_method_costs():
    methods = {"single_task_as_long": 0, "cross_stitch_from_start": 1}
    known = statistics(rows({**methods, "hard_sharing": 1, "split@conv2": 2}))
    sizes = {"single_task_as_long": 300, "hard_sharing": 130, "split@conv2": 201}

    *lines, note = filter(None, brief(known, sizes).splitlines())

    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    assert [row[-2] for row in cells] == [
        *("cost ↓", "---:"),
        *("1.00", "", "0.43", "0.67"),
        "",  # of a difference
    ]
    assert len({len(row) for row in cells}) == 1
    assert "Cost: the multiply-adds" in note
    assert "cost" not in brief(known).lower()


def test_a_table_of_several_seeds():
    known = rows({"single_task_longer": 0, "cross_stitch": 1})
    of_paper = {"cross_stitch": {("segmentation", "miou"): 19.3}}

    lines = markdown(statistics(known, of_paper)).splitlines()

    assert lines[1:6] == [
        "| segmentation | seeds | mIoU, % ↑ |",
        "| --- | ---: | ---: |",
        "| single-task, trained on | 3 | 21.00 ± 1.00 |",
        "| cross-stitch | 3 | **22.01 ± 1.01**<br>+1.01 (+0.99 to +1.03) † |",
        "| *paper: cross-stitch* |  | *19.3* |",
    ]
    assert (
        "its 95 % t-interval (cross-stitch against single-task, trained on)"
        in lines[-1]
    )
    assert "In italics what the paper reports" in lines[-1]


def test_a_table_of_one_seed_says_no_more_than_it_knows():
    text = markdown(
        statistics(rows({"single_task_longer": 0, "cross_stitch": 1}, seeds=1))
    )

    assert "| cross-stitch | 1 | 21.0 |" in text
    assert "One seed: a difference may be chance." in text
    assert not any(mark in text for mark in ("±", "**", "<br>", "interval", "paper"))


def test_a_difference_of_fewer_seeds_says_of_how_many():
    known = rows({"cross_stitch": 1}, seeds=5) + rows(
        {"single_task_longer": 0}, seeds=2
    )

    assert "; 2 seeds)" in markdown(statistics(known))


def test_what_the_paper_has_and_we_have_not_stands_below():
    text = markdown(
        statistics(rows({"single_task": 0}), paper.table("nyuv2", "methods"))
    )

    place = [
        text.index(f"paper: {x}") for x in ("single-task*", "ensemble", "cross-stitch")
    ]
    assert place == sorted(place)


def test_a_table_of_many_classes_is_turned_on_its_side():
    classes = [f"iou/class {i}" for i in range(9)]

    lines = markdown(statistics(rows({"single_task": 0}, metrics=classes))).splitlines()

    assert lines[1] == "| segmentation | single-task |"
    assert lines[3:5] == ["| seeds | 3 |", "| IoU, class 0, % ↑ | 21.00 ± 1.00 |"]


@pytest.mark.parametrize("classes", [["a|b"], ["a|b", *"cdefghijk"]])
def test_a_class_may_have_a_bar_in_its_name(classes):
    text = markdown(
        statistics(rows({"single_task": 0}, metrics=[f"iou/{x}" for x in classes]))
    )
    lines = [x for x in text.splitlines() if x.startswith("|")]

    assert "IoU, a\\|b, % ↑" in text
    columns = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
    assert len(columns) == 1


def test_a_file_gets_its_tables_and_keeps_the_rest(results, tmp_path):
    path = tmp_path / "README.md"
    mark = "<!-- table: nyuv2/methods -->\nold\n<!-- /table -->"
    path.write_text(f"# Title\n\n{mark}\n\nBetween.\n\n{mark}\n\nEnd.\n")

    assert update_tables(path, results)

    text = path.read_text()
    assert text.count("| hard sharing | 3 |") == 2
    assert "old" not in text
    assert text.startswith("# Title\n\n<!-- table: nyuv2/methods -->\n\n| segmentation")
    assert text.endswith(".\n<!-- /table -->\n\nEnd.\n")
    assert "\n<!-- /table -->\n\nBetween.\n\n<!-- table: nyuv2/methods -->\n" in text
    assert not update_tables(path, results)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: nyuv2/methods -->\n", "Expected '<!-- /table -->' after"),
        ("<!-- /table -->\n", "Expected '<!-- /table -->' after '<!-- /table -->'"),
        (
            "<!-- table: nyuv2/methods -->\n<!-- table: a/b -->\n<!-- /table -->",
            "Received: '<!-- table: nyuv2/methods -->', then '<!-- table: a/b -->'",
        ),
        (
            "<!-- table: nyuv2 -->\n<!-- /table -->\n",
            "Expected '<!-- table: RECIPE/STU",
        ),
        (
            "<!-- table: scenes/init -->\n<!-- /table -->\n",
            "There are no raw values .*init.csv.*python -m training study RECIPE init`"
            ".*writes them to RUNS/results: .* as in --results runs/results",
        ),
        (
            # From the name the command is not told: there may be a recipe of that name.
            "<!-- table: scenes-validated/demo -->\n<!-- /table -->\n",
            "options by which runs are in RUNS/scenes-validated, writes",
        ),
    ],
)
def test_a_bad_mark_is_refused_and_the_file_left(results, tmp_path, text, message):
    path = tmp_path / "README.md"
    path.write_text(text)

    with pytest.raises(ValueError, match=rf"README.md: .*{message}"):
        update_tables(path, results)
    assert path.read_text() == text


def test_the_paper_s_values_are_of_the_tasks_and_methods_that_they_name():
    table = paper.table("nyuv2", "methods")

    assert table["single_task"]["normals", "mean_angle"] == 34.8
    assert table["cross_stitch"]["segmentation", "miou"] == 19.3
    voc = paper.table("voc2008_alexnet", "methods")["hard_sharing"]
    assert voc == {
        ("detection", "mean_ap_voc2008"): 42.7,
        ("attributes", "mean_ap"): 54.1,
    }
    assert paper.splits("voc2008_alexnet")["attributes", "mean_ap"]["fc7"] == -2.2


@pytest.mark.parametrize("recipe", ["nyuv2", "voc2008_alexnet"])
@pytest.mark.parametrize("study", STUDIES)
def test_the_paper_s_values_stand_beside_methods_that_the_study_has(recipe, study):
    spelled = {*STUDIES[study](recipes.find(recipe)), "split@conv2", "split@fc7"}
    assert paper.table(recipe, study).keys() <= spelled


@pytest.mark.parametrize(
    "recipe", ["scenes", "nyuv2-toy", "nyuv2-labels10", "nyuv2_pretrained", "voc2008"]
)
def test_the_paper_s_values_stand_beside_no_other_tower_size_or_labels(recipe):
    assert paper.table(recipe, "methods") == paper.splits(recipe) == {}
