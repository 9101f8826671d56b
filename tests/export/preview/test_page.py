"""The page, as a browser shows it. KCS_SCREENSHOTS=DIR keeps pictures of it."""

import os
import pathlib

import numpy as np
import pytest
from PIL import Image

# One process runs all that share the server.
pytestmark = pytest.mark.xdist_group("serving")


@pytest.fixture
def address(rest_address):
    return rest_address


@pytest.fixture(params=[(1280, 800), (375, 700)], ids=["desk", "phone"])
def page(browser, address, request, tmp_path):
    width, height = request.param
    page = browser.new_page(viewport={"width": width, "height": height})
    page.asked, page.wrong = [], []
    page.on("request", lambda asked: page.asked.append(asked.url))
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("console", lambda message: page.wrong.append(message.text))
    page.goto(address)
    yield page
    folder = pathlib.Path(os.environ.get("KCS_SCREENSHOTS", tmp_path))
    page.screenshot(path=folder / f"{request.node.name}.png", full_page=True)
    reach = page.evaluate("document.documentElement.scrollWidth")
    page.close()
    assert reach <= width  # nothing is cut off at the side


@pytest.fixture
def picture(served, tmp_path):
    """A picture of the model's size: the canvas sends its very pixels."""
    (pixels,) = served.pictures(seed=3)
    path = tmp_path / "room.png"
    Image.fromarray(pixels).save(path)
    return path, pixels


def shown(page, task):
    """The pixels of a task's map, as the browser has them."""
    image = page.locator(f'img[alt="{task} of the picture"]')
    size, values = image.evaluate(
        """(image) => {
            const canvas = document.createElement("canvas");
            [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
            const context = canvas.getContext("2d");
            context.drawImage(image, 0, 0);
            const data = context.getImageData(0, 0, canvas.width, canvas.height).data;
            return [[canvas.height, canvas.width], Array.from(data)];
        }"""
    )
    return np.array(values).reshape(*size, 4)[..., :3]


def test_a_picture_is_answered_over_itself_with_class_names(page, picture, served):
    path, pixels = picture
    page.set_input_files("#file", path)
    page.get_by_text("room.png, answered by version").wait_for()

    expected = served.predict([pixels])
    classes = expected["segmentation"][0].argmax(axis=-1)
    meaning = served.answers["segmentation"]
    colours = np.array(meaning["colours"])
    np.testing.assert_array_equal(shown(page, "segmentation"), colours[classes])
    red = (expected["normals"][0][..., 0] + 1) / 2 * 255
    np.testing.assert_allclose(shown(page, "normals")[..., 0], red, atol=0.51)

    legend = page.locator("section", has_text="What each pixel shows").locator("li")
    names = {text.rsplit(" ", 1)[0] for text in legend.all_inner_texts()}
    assert names == {meaning["names"][number] for number in np.unique(classes)}

    over = page.locator("img.map").first
    under = page.locator(".stack img").first
    assert over.bounding_box() == under.bounding_box()
    assert page.wrong == []


def test_the_page_asks_nobody_else(page, picture, rest_address):
    page.set_input_files("#file", picture[0])
    page.get_by_text("answered by version").wait_for()
    local = (rest_address, "blob:", "data:")
    assert page.asked
    assert all(url.startswith(local) for url in page.asked)


def test_a_picture_can_be_dropped(page, served):
    data = list(served.png(served.pictures()[0]))
    page.evaluate(
        """(data) => {
            const moved = new DataTransfer();
            const bytes = new Uint8Array(data);
            moved.items.add(new File([bytes], "dropped.png", {type: "image/png"}));
            const event = new DragEvent("drop", {dataTransfer: moved, bubbles: true});
            document.getElementById("drop").dispatchEvent(event);
        }""",
        data,
    )
    page.get_by_text("dropped.png, answered by version").wait_for()


def test_of_two_pictures_the_last_chosen_is_shown(page, picture, served, tmp_path):
    """Though the answer to the first one comes last."""
    asked = []

    def hold_the_first(route):
        asked.append(route)
        if len(asked) > 1:
            route.continue_()

    (pixels,) = served.pictures(seed=4)
    Image.fromarray(pixels).save(tmp_path / "second.png")
    page.route("**/draw", hold_the_first)
    with page.expect_request("**/draw"):
        page.set_input_files("#file", picture[0])
    page.set_input_files("#file", tmp_path / "second.png")
    page.get_by_text("second.png, answered by version").wait_for()
    before = shown(page, "segmentation")
    with page.expect_response("**/draw"):
        asked[0].continue_()
    page.wait_for_timeout(200)

    assert page.locator("#said").inner_text().startswith("second.png, answered")
    np.testing.assert_array_equal(shown(page, "segmentation"), before)
    assert page.wrong == []


def test_what_is_no_picture_is_told_so(page, tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("no picture")
    page.set_input_files("#file", text)
    page.get_by_text("notes.txt is no picture that this browser can read").wait_for()
    assert page.locator("#answers section").count() == 0


class TestRegions:
    """The page of a model that finds objects in regions."""

    @pytest.fixture
    def address(self, region_addresses):
        return region_addresses[1]

    def test_objects_are_boxed_and_told_their_attributes(
        self, page, shapes, shapes_folder
    ):
        page.set_input_files("#file", shapes_folder / "shapes.jpg")
        page.get_by_text("shapes.jpg, answered by version").wait_for()
        whole = page.locator(".stack img").bounding_box()
        boxes = {
            box.inner_text().split()[1]: box.bounding_box()
            for box in page.locator(".box").all()
        }
        assert boxes.keys() == {"red", "green"}
        scale = whole["width"] / shapes.size[0]
        for name, box in boxes.items():
            start = (box["x"] - whole["x"], box["y"] - whole["y"])
            corners = [*start, start[0] + box["width"], start[1] + box["height"]]
            expected = np.array(getattr(shapes, name)) * scale
            # Two pixels of the model's image are 8.3 of the picture.
            np.testing.assert_allclose(corners, expected, atol=9 * scale)
        told = page.locator("li").all_inner_texts()
        assert sorted(text.split()[1] for text in told) == ["green", "red"]
        assert all("%: dark" in text or "%: colourful" in text for text in told)
        assert page.locator("section").count() == 1
        assert page.wrong == []

    def test_nothing_that_is_found_is_told_so(self, page, shapes_folder):
        page.set_input_files("#file", shapes_folder / "plain.png")
        page.get_by_text("nothing found").wait_for()
        assert page.locator(".box").count() == 0
        assert page.wrong == []
