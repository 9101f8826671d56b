"""The report, as a browser shows it. KCS_SCREENSHOTS=DIR keeps pictures of it."""

import os
import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from training.study.report import write_report


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
