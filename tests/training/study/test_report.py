"""The report, as a browser shows it. KCS_SCREENSHOTS=DIR keeps pictures of it."""

import json
import os
import re
import shutil
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

from training.files import Row
from training.study import recorded
from training.study.report import (
    _alphas,
    _classes,
    _label_fractions,
    _splits,
    write_report,
)

pytestmark = pytest.mark.xdist_group("report")


@pytest.fixture(scope="module")
def report(runs, tmp_path_factory):
    return write_report(runs, tmp_path_factory.mktemp("report") / "new" / "report.html")


@pytest.fixture(scope="module")
def html(report):
    return report.read_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 380])
def test_a_browser_shows_it_whole_and_asks_nobody(
    browser, report, width, scheme, tmp_path
):
    page = browser.new_page(
        viewport={"width": width, "height": 800}, color_scheme=scheme
    )
    asked, said = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("console", lambda message: said.append(message.text))
    page.goto(report.as_uri())
    page.evaluate("for (const x of document.querySelectorAll('details')) x.open = true")
    folder = Path(os.environ.get("KCS_SCREENSHOTS", tmp_path))
    page.screenshot(path=folder / f"report-{width}-{scheme}.png", full_page=True)
    broken = page.evaluate(
        "Array.from(document.images).filter(x => !x.complete || !x.naturalWidth).length"
    )
    reach = page.evaluate("document.documentElement.scrollWidth")
    page.close()

    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [report.as_uri()]
    assert broken == 0
    assert reach <= width


def test_intervals_wrap_before_a_table_is_wider_than_the_page(browser, report):
    page = browser.new_page(viewport={"width": 800, "height": 800})
    page.goto(report.as_uri())
    wider = page.evaluate(
        "Array.from(document.querySelectorAll('.wide'))"
        ".filter(x => x.scrollWidth > x.clientWidth).map(x => x.ariaLabel)"
    )
    page.close()

    assert wider == []


def test_equal_runs_make_equal_pages(runs, report, html):
    assert write_report(runs, report).read_text() == html


def test_it_says_what_was_run(html):
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html))

    assert "single-task, trained on" in text
    assert "Begun and not finished, so not in the tables: cross-stitch, seed 3." in text
    assert "paper: cross-stitch" in text
    assert "Labels of segmentation on 10&nbsp;% of the train images" in text
    assert "schedule.learning_rate 0.05" in text
    assert "cross-stitch against single-task, trained on" in text  # which baseline
    assert "datasets" not in text


def test_every_run_is_linked_with_its_recipe_and_commit(report, html, runs):
    table = html.split("<h3>Runs and settings</h3>")[1].split("</table>")[0]
    (row,) = (x for x in table.split("<tr>") if ">split at conv2</th>" in x)

    for link in re.findall(r'href="(.*?)"', row):
        assert (report.parent / unquote(link)).exists(), link
    assert row.count("href=") == 3 + 1  # seeds, and the recipe of the first
    assert '<td class="made">0123abc</td>' in row


def test_gain_and_cost_stand_first(html):
    table = html.split("<h3>Gain and cost</h3>")[1].split("</table>")[0]
    (row,) = (x for x in table.split("<tr>") if ">cross-stitch</th>" in x)
    cells = re.findall(r"<td>(.*?)</td>", row)

    # 50 of every 40: more of segmentation's two, fewer degrees of normals' two.
    assert re.fullmatch(
        r"\+\d\.\d\d ± \d\.\d\d<small>\(.* to .*\)( †)?</small>", cells[0]
    )
    # Six epochs of a minute by the single-task networks, and three of its own.
    assert cells[1:] == ["1.25", "3.4", "9"]
    assert html.index("Gain and cost") < html.index("Results")


def test_a_click_sorts_a_table_and_another_turns_it_round(browser, report):
    page = browser.new_page()
    page.goto(report.as_uri())
    table = page.locator("table").nth(2)  # segmentation, of nyuv2
    button = table.locator("thead button").nth(2)

    def shown():
        rows = table.locator("tbody tr:not(.paper) td:nth-child(3)").all_inner_texts()
        return [float(x.split(" ")[0]) for x in rows]

    before = shown()
    button.click()
    down = shown()
    button.click()
    up = shown()
    last = table.locator("tbody tr").last.get_attribute("class")
    page.close()

    assert down == sorted(before, reverse=True) != before
    assert up == sorted(before)
    assert last == "paper"


def test_it_shows_a_picture_of_each_kind(html):
    from_start = (
        "IoU of segmentation: cross-stitch from the start minus single-task, as long, "
        "seeds: 1"
    )

    captions = re.findall(r"<figcaption>(.*?)</figcaption>", html)

    assert captions == [
        "scenes: labels of segmentation",
        "segmentation &lt;1&gt;",
        "Alpha of cross-stitch, seed 0",
        "Mean alpha of cross-stitch by epoch, seed 0",
        "Training loss by epoch, a line per run",
        "IoU of segmentation: cross-stitch minus single-task, trained on, seeds: 3",
        "Gain of a split at each layer over its baseline",
        *2 * ("Training loss by epoch, a line per run", from_start),
    ]


def test_a_picture_of_label_fractions_is_of_one_experiment(runs, tmp_path):
    """A search, held-out images and other tasks are not the recipe with less."""

    def copied(name, share):
        shutil.copytree(runs / "scenes-labels10", tmp_path / name)
        for path in (tmp_path / name).glob("*/*/recipe.json"):
            said = json.loads(path.read_text())
            said["data"]["label_fraction"] = ["segmentation", share]
            path.write_text(json.dumps(said))

    for name, share in (
        ("scenes-labels10", 0.1),
        ("scenes-labels5-search", 0.05),
        ("scenes-search", 1.0),
        ("scenes-labels25-validated", 0.25),
        ("scenes-labels50-a+b", 0.5),
    ):
        copied(name, share)

    def captions():
        html = write_report(tmp_path, tmp_path / "report.html").read_text()
        return re.findall(r"<figcaption>(.*?: labels of .*?)</figcaption>", html)

    assert captions() == []
    copied("scenes-a+b", 1.0)
    copied("scenes-labels50", 0.5)
    assert captions() == [
        f"{x}: labels of segmentation" for x in ("scenes-a+b", "scenes")
    ]


def test_a_method_that_no_longer_exists_is_shown(runs, tmp_path):
    folder = tmp_path / "nyuv2"
    shutil.copytree(runs / "nyuv2/cross_stitch/seed0", folder / "soft_sharing/seed0")
    html = write_report(tmp_path, tmp_path / "report.html").read_text()

    assert ">soft sharing</th>" in html
    run = recorded.Run(folder / "soft_sharing/seed0")
    assert run.costs["seconds"] == 3 * 60  # what it started from is not known


def changed(run, **parts):
    """The run's recipe with other values in its parts."""
    said = json.loads((run / "recipe.json").read_text())
    for part, values in parts.items():
        said.setdefault(part, {}).update(values)
    (run / "recipe.json").write_text(json.dumps(said))


def test_runs_that_are_not_of_one_recipe_are_told(runs, tmp_path):
    def told():
        html = write_report(tmp_path, tmp_path / "report.html").read_text()
        return re.findall(r"not of one recipe.*?Remove", html)

    folder = tmp_path / "nyuv2"
    for method in ("single_task_as_long", "split@conv2", "split@conv4"):
        for seed in range(2):
            run = folder / method / f"seed{seed}"
            shutil.copytree(runs / "nyuv2" / method / f"seed{seed}", run)
            changed(run, training={"dtype": "float32", "loss_weighting": None})
    weighed = folder / "split@conv4,loss_weighting=uncertainty"
    (folder / "split@conv4").rename(weighed)
    for seed in range(2):
        changed(weighed / f"seed{seed}", training={"loss_weighting": "uncertainty"})
    assert told() == []

    changed(folder / "split@conv2/seed1", training={"dtype": "mixed_bfloat16"})
    (sentence,) = told()
    both = (
        "float32 (single-task, as long, seed 0), mixed_bfloat16 (split at conv2, seed 1"
    )
    assert f"training.dtype, {both})" in sentence
    changed(folder / "split@conv2/seed1", training={"dtype": "float32"})
    changed(weighed / "seed1", schedule={"epochs": 99})
    (sentence,) = told()
    assert "schedule.epochs, 4 (" in sentence
    assert "99 (split at conv4, loss weighting uncertainty, seed 1)" in sentence


def test_losses_as_they_were_weighed_are_said_to_be_so(runs, tmp_path):
    for method in ("single_task_as_long", "split@conv2"):
        target = tmp_path / "nyuv2" / method / "seed0"
        shutil.copytree(runs / "nyuv2" / method / "seed0", target)
    html = write_report(tmp_path, tmp_path / "report.html").read_text()
    assert "Weighed" not in html

    changed(target, training={"loss_weighting": "uncertainty"})
    html = write_report(tmp_path, tmp_path / "report.html").read_text()
    assert "Weighed, so not to be held against others: split at conv2<" in html


def test_layers_stand_in_their_order(runs, tmp_path):
    order = ["block7", "block9", "block11", "block15_a", "score"]
    for layer in reversed(order):
        target = tmp_path / f"split@{layer}" / "seed0"
        shutil.copytree(runs / "nyuv2" / "split@conv2" / "seed0", target)

    assert list(recorded.by_method(tmp_path)) == [f"split@{x}" for x in order]


def test_splits_stand_beside_the_paper_s_in_its_metric(monkeypatch):
    asked = []
    monkeypatch.setattr("training.study.figures.splits", lambda *x: asked.append(x))
    monkeypatch.setattr("training.study.report._picture", lambda *_: None)
    names = ("single_task_as_long", "split@conv2", "split@conv3")
    methods = {name: [] for name in names}
    rows = [
        Row(method, 0, task, name, 1.0)
        for method in methods
        for task, names in {
            "attributes": ["mean_ap"],
            "detection": ["mean_ap", "mean_ap_voc2008"],
        }.items()
        for name in names
    ]
    _splits("voc2008_alexnet", methods, rows)

    _, panels, published = asked[0]
    assert panels == [("attributes", "mean_ap"), ("detection", "mean_ap_voc2008")]
    assert set(panels) == set(published)


@pytest.fixture
def asked(monkeypatch):
    """`asked(name)`: the list of what that figure is asked for, and not drawn."""
    monkeypatch.setattr("training.study.report._picture", lambda *_: None)

    def of_figure(name):
        calls = []
        place = f"training.study.figures.{name}"
        monkeypatch.setattr(place, lambda *x: calls.append(x))
        return calls

    return of_figure


def test_alphas_stand_under_the_tasks_that_they_are_of(runs, asked):
    calls = asked("alpha")
    methods = recorded.by_method(runs / "nyuv2")
    _alphas(methods)
    by_epoch = methods["cross_stitch"][0].alphas_by_epoch

    # alpha's axes are the tasks in sorted order, which the answers are not
    assert [tasks for _, tasks in calls] == [["normals", "segmentation"]]
    assert list(methods["cross_stitch"][0].json("answers")) != calls[0][1]
    pair = ("cross_stitch_pool1", "normals", "segmentation")
    assert by_epoch[pair] == pytest.approx([0.1, 0.2, 0.3])


def test_classes_change_seed_by_seed_and_are_counted_in_train(runs, asked):
    calls = asked("per_class")
    methods = recorded.by_method(runs / "nyuv2")
    ours, theirs = methods["cross_stitch"], methods["single_task_longer"]
    known = recorded.class_changes(ours, reversed(theirs))
    ((key, (classes, changes, counts)),) = known.items()
    miou = [
        [run.json("metrics")["segmentation"]["miou"] for run in of_method]
        for of_method in (ours, theirs)
    ]
    # The i-th class gains i times 0.5, and every class what the seed's luck gives.
    luck = 2 * np.subtract(*miou) - 0.5
    expected = np.add.outer(luck, 0.5 * np.arange(5))

    assert (key, len(classes)) == (("segmentation", "iou"), 5)
    np.testing.assert_allclose(changes, expected, atol=1e-9)
    np.testing.assert_array_equal(counts, 10.0 ** np.arange(1, 6))  # not of test
    _classes(methods)
    ((_, _, gains, _, deviations),) = calls
    np.testing.assert_allclose(gains, expected.mean(0), atol=1e-9)
    np.testing.assert_allclose(deviations, expected.std(0, ddof=1), atol=1e-9)


def test_label_fractions_begin_with_the_task_that_lacks_labels(
    runs, asked, monkeypatch
):
    calls = asked("label_fraction")
    told = recorded.label_fraction
    monkeypatch.setattr(recorded, "label_fraction", lambda x: ("normals", told(x)[1]))
    folders = [runs / f"scenes-labels{percent}" for percent in (10, 50)]
    _label_fractions({x: recorded.by_method(x) for x in folders})

    ((by_share, panels),) = calls
    assert [task for task, _ in panels] == ["normals", "segmentation"]
    assert list(by_share) == [0.1, 0.5]


def test_an_ensemble_took_the_time_of_both_its_networks(runs, tmp_path):
    for method, seed in (("single_task", 0), ("split@conv2", 1000)):  # 6 and 4 epochs
        target = tmp_path / "single_task" / f"seed{seed}"
        shutil.copytree(runs / "nyuv2" / method / "seed0", target)

    assert recorded.Run(tmp_path / "ensemble/seed0").costs == {"seconds": 10 * 60}


def test_large_costs_are_numbers_that_the_table_sorts():
    costs = {"parameters": 4_649_000, "multiply_adds": 12e12, "seconds": 74_040}
    assert recorded.shown_costs(costs) == ["4.65", "12000", "1230"]


def test_a_run_that_was_put_aside_is_none(runs, tmp_path):
    folder = tmp_path / "nyuv2" / "cross_stitch"
    for name in ("seed0", "seed0.bak", "seed"):
        shutil.copytree(runs / "nyuv2/cross_stitch/seed0", folder / name)

    (of_method,) = recorded.by_method(tmp_path / "nyuv2").values()
    assert [run.folder.name for run in of_method] == ["seed0"]


def test_trained_on_for_other_epochs_begins_where_the_single_task_networks_ended(runs):
    methods = recorded.by_method(runs / "nyuv2")
    longer = ("single_task_longer@epochs=8", "cross_stitch@epochs=8")
    known = methods | dict.fromkeys(longer, methods["cross_stitch"])

    after = ("cross_stitch", "single_task_longer", *longer)
    assert recorded.epochs_before(known) == dict.fromkeys(after, 6)


def test_names_are_text_and_not_markup(html):
    assert "&lt;b&gt;lamp&lt;/b&gt; &amp; &#39;shade&#39;" in html
    assert "<b>lamp" not in html
    assert "rooms &lt;&amp;&gt;" in html


def test_without_a_finished_run_it_says_so_and_writes_nothing(tmp_path):
    target = tmp_path / "report.html"
    (tmp_path / "runs" / "scenes" / "single_task" / "seed0").mkdir(parents=True)

    with pytest.raises(ValueError, match=r"There is no finished run in .*runs"):
        write_report(tmp_path / "runs", target)
    with pytest.raises(ValueError, match=r"There is no finished run in .*nowhere"):
        write_report(tmp_path / "nowhere", target)
    assert not target.exists()
