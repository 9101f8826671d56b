"""How an answer is drawn, by what answers.json says of it."""

import json

import numpy as np
import pytest
from PIL import Image

from export.drawing import draw, over
from export.protocol import read_answers

CLASSES = {"kind": "classes", "names": ["wall", "floor", "lamp"]}
COLOURS = [[1, 2, 3], [40, 50, 60], [7, 8, 9]]


def probabilities(classes, count=4):
    return np.eye(count)[np.asarray(classes)]


def test_classes_have_their_colours_and_a_legend_by_share():
    answer = {"rooms": probabilities([[0, 2], [2, 2], [2, 0]], count=3)}
    drawing = draw(answer, {**CLASSES, "colours": COLOURS})
    np.testing.assert_array_equal(drawing.map[0], [[1, 2, 3], [7, 8, 9]])
    assert drawing.map.dtype == "uint8"
    assert drawing.legend == [("lamp 67%", (7, 8, 9)), ("wall 33%", (1, 2, 3))]
    assert drawing.rows == []


def test_a_share_of_less_than_a_percent_is_not_none():
    classes = np.zeros((20, 20), int)
    classes[0, 0] = 1
    drawing = draw({"rooms": probabilities(classes)}, CLASSES)
    assert [text for text, _ in drawing.legend] == ["wall 100%", "floor <1%"]


def test_classes_without_colours_or_names_differ_all_the_same():
    drawing = draw({"rooms": probabilities([[0, 1, 2, 3]])}, CLASSES)
    names = [text.rsplit(" ", 1)[0] for text, _ in drawing.legend]
    assert names == ["wall", "floor", "lamp", "class 3"]
    assert len({tuple(colour) for colour in drawing.map[0]}) == 4


def test_classes_of_a_whole_image_are_the_best_names():
    drawing = draw({"kind": np.array([0.1, 0.7, 0.2])}, CLASSES)
    assert drawing.rows == [("floor", "0.700"), ("lamp", "0.200"), ("wall", "0.100")]


@pytest.mark.parametrize(
    ("normal", "colour"),
    [
        ((1, 0, 0), (255, 128, 128)),  # right
        ((0, -1, 0), (128, 255, 128)),  # up, for y points down
        ((0, 0, -1), (128, 128, 255)),  # to the camera, for z points away
        ((0, 0, 0), (0, 0, 0)),  # undefined
    ],
)
def test_normals_have_the_customary_colours(normal, colour):
    answer = {"normals": np.full((2, 3, 3), normal, "float32")}
    drawing = draw(answer, {"kind": "normals"})
    np.testing.assert_array_equal(drawing.map, np.full((2, 3, 3), colour))


@pytest.mark.parametrize("meaning", [{}, {"kind": "new"}, {"kind": "classes"}])
def test_what_is_not_known_is_numbers(meaning):
    few = draw({"age": np.array([[30.5, 2]])}, {**meaning, "units": "years"})
    many = draw({"depth": np.arange(9.0).reshape(3, 3)}, {**meaning, "units": "m"})
    both = draw({"a": np.array(1.0), "b": np.array(2.0)}, meaning)
    assert few.rows == [("age", "30.5 2 years")]
    assert [value for _, value in many.rows] == ["0 m", "4 m", "8 m"]
    assert both.rows == [("a", "1"), ("b", "2")]
    assert few.map is many.map is both.map is None


def test_a_map_lies_over_the_whole_picture_with_its_legend_below():
    picture = Image.new("RGB", (300, 90), "white")
    answer = {"rooms": probabilities([[0, 2]], count=3)}
    drawing = draw(answer, {**CLASSES, "colours": COLOURS})
    page = over(picture, drawing, opacity=1.0)
    assert page.size == (300, 90 + 2 * 20)
    assert page.getpixel((149, 89)) == (1, 2, 3)
    assert page.getpixel((150, 0)) == (7, 8, 9)
    assert page.getpixel((10, 90 + 10)) == (1, 2, 3)


@pytest.mark.parametrize(("text", "message"), [("{", "be JSON"), ("[]", "meaning}")])
def test_answers_that_cannot_be_read_name_their_file(tmp_path, text, message):
    assert read_answers(tmp_path) == {}
    (tmp_path / "assets.extra").mkdir()
    path = tmp_path / "assets.extra" / "answers.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"answers.json' must .*{message}"):
        read_answers(tmp_path)
    path.write_text(json.dumps({"rooms": CLASSES}))
    assert read_answers(tmp_path) == {"rooms": CLASSES}
