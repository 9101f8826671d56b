"""The documentation site is built strictly, and fetches nothing."""

import csv
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

import keras_cross_stitch

pytestmark = [pytest.mark.xdist_group("site"), pytest.mark.slow]

ROOT = Path(__file__).parents[1]
FETCHED = re.compile(
    r"<(?:script|img|iframe)[^>]* src=\"http|<link[^>]*stylesheet[^>]*//"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        check=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    return folder


def test_nothing_is_fetched_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 10
    for page in pages:
        assert not FETCHED.search(page.read_text()), page


def test_every_public_name_has_its_place_in_the_api(site):
    page = (site / "api.html").read_text()
    for name in keras_cross_stitch.__all__:
        assert f'id="keras_cross_stitch.{name}"' in page, name
        head = page.split(f'id="keras_cross_stitch.{name}"')[1]
        known = getattr(keras_cross_stitch, name)
        if not inspect.isclass(known) or "__init__" in vars(known):
            assert "doc-signature" in head.split("doc-contents")[0], name
    assert "&gt;&gt;&gt;" not in re.sub("<code.*?</code>", "", page, flags=re.S)


def test_what_a_function_returns_is_one_item_and_messages_break(site):
    returns = re.findall(r"Returns:.*?</ul>", (site / "api.html").read_text(), re.S)
    assert len(returns) > 5
    for items in returns:
        assert items.count('<li class="doc-section-item') == 1, items
    assert 'class="language-text' in (site / "errors.html").read_text()


def test_formulas_are_drawn_without_a_script(site):
    page = (site / "how_it_works.html").read_text()
    assert page.count("<math") > 10
    assert "arithmatex" not in page


def test_what_the_design_draws_is_there():
    page = (ROOT / "docs" / "design.md").read_text()
    (tree,) = re.findall(r"```text\n(.*?)```", page, re.S)
    folder = ROOT
    for line in tree.splitlines():
        names = re.match(r" *((?:[\w./]+, )*[\w./]+)", line)[1].split(", ")
        if not line.startswith(" "):
            folder = ROOT / names[0]
            assert folder.is_dir(), line
        else:
            assert all((folder / name).exists() for name in names), line


def test_every_link_within_the_site_leads_somewhere(site):
    elsewhere = re.compile(r"\w+:")  # https:, mailto:, data:
    for page in site.rglob("*.html"):
        if page.name == "404.html":  # read from any folder of a server
            continue
        text = page.read_text("utf-8")
        for link in set(re.findall(r'(?:href|src)="([^"]+)"', text)):
            path, _, part = unquote(link).partition("#")
            if elsewhere.match(path):
                continue
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name}: {link}"
            if part and target.suffix == ".html":
                assert f'id="{part}"' in target.read_text("utf-8"), link


def test_the_demo_takes_as_long_on_each_page():
    told = {
        (page, minutes)
        for page in ("README.md", *(f"docs/{x.name}" for x in ROOT.glob("docs/*.md")))
        for minutes in re.findall(
            r"make demo[^.]{0,60}?([\d.]+(?: to [\d.]+)?) minutes",
            (ROOT / page).read_text("utf-8"),
        )
    }
    assert {page for page, _ in told} == {"README.md", "docs/serving.md"}
    assert len({minutes for _, minutes in told}) == 1, told


def test_compatibility_counts_its_rows():
    page = (ROOT / "docs/compatibility.md").read_text("utf-8")
    told = re.findall(r"(\d+) of (\d+) work", page)
    counted = []
    for name in ("compatibility_pairs", "compatibility"):
        path = ROOT / "docs/results" / f"{name}.csv"
        with path.open(newline="", encoding="utf-8") as file:
            results = [row["result"] for row in csv.DictReader(file)]
        counted.append((str(results.count("works")), str(len(results))))
    assert told == counted
