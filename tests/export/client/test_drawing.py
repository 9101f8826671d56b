"""How an answer is drawn, by what answers.json says of it."""

import io

import numpy as np
import pytest
from PIL import Image

from export.client.drawing import answer, draw, drawn_with, over

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


def test_depth_has_the_colours_of_its_range_and_a_scale():
    meaning = {"kind": "depth", "range": [0.0, 10.0], "units": "metres"}
    metres = np.array([[[0.0], [2.5], [10.0]], [[-3.0], [99.0], [np.nan]]], "float32")
    drawing = draw({"depth": metres}, {**meaning, "colours": [[0] * 3, [200, 100, 0]]})

    np.testing.assert_array_equal(drawing.map[0], [[0] * 3, [50, 25, 0], [200, 100, 0]])
    np.testing.assert_array_equal(drawing.map[1, :2], [[0] * 3, [200, 100, 0]])
    texts, colours = zip(*drawing.legend, strict=True)
    assert texts == tuple(f"{x} metres" for x in ("0", "2.5", "5", "7.5", "10"))
    assert colours == tuple((50 * k, 25 * k, 0) for k in range(5))
    grey = draw({"depth": metres}, meaning)  # without colours: from white to black
    assert grey.map[0, :, 0].tolist() == [255, 191, 0]
    far = draw({"depth": metres + 5}, {**meaning, "range": [5.0, 15.0]})
    np.testing.assert_array_equal(far.map, grey.map)
    assert [far.legend[i][0] for i in (0, -1)] == ["5 metres", "15 metres"]


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
    both = draw({"b": np.array(2.0), "a": np.array(1.0)}, meaning)
    assert few.rows == [("age", "30.5 2 years")]
    assert [value for _, value in many.rows] == ["0 m", "4 m", "8 m"]
    assert both.rows == [("a", "1"), ("b", "2")]
    assert few.map is many.map is both.map is None


def first(array):
    """The drawing of an answer to one picture, such as a server gives."""
    return answer(lambda task: {task: np.asarray(array)}, "name", {})


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (np.array([b"caf\xc3\xa9"], object), "caf\u00e9"),
        (np.array([[b"a b", b"c\xff"]], object), "a b, c\ufffd"),
        (np.array(b"all", object), "all"),
        (np.float32(2.5), "2.5"),
        (np.int64(7), "7"),
        (np.array([123456]), "123456"),
        (np.array([False]), "False"),
        (np.array([[True, False]]), "True False"),
        (np.float16([[1234.5]]), "1234"),
        (np.array([[b"x"] * 9], object), "x, x, x, x, x, x, x, x, ..."),
    ],
)
def test_text_whole_numbers_truths_and_scalars_are_shown_as_they_are(array, text):
    assert first(array).rows == [("name", text)]


def test_many_whole_numbers_and_truths_are_told_by_their_ends():
    numbers = first(np.arange(100000, 100010)[None]).rows
    assert [text for _, text in numbers] == ["100000", "1e+05", "100009"]
    truths = first([[True, *[False] * 9]]).rows
    assert [text for _, text in truths] == ["False", "0.1", "True"]


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8"])
@pytest.mark.parametrize("shape", [(3, 2), (3, 2, 1)])
def test_classes_by_their_numbers_are_drawn_as_those_by_scores(dtype, shape):
    numbers = np.array([[0, 2], [2, 2], [2, 0]])
    meaning = {**CLASSES, "colours": COLOURS}
    scores = draw({"rooms": probabilities(numbers, count=3)}, meaning)
    drawing = draw({"rooms": numbers.astype(dtype).reshape(shape)}, meaning)
    np.testing.assert_array_equal(drawing.map, scores.map)
    assert drawing.legend == scores.legend


def test_numbers_that_no_class_has_are_drawn_too():
    numbers = np.array([[-1, 0, 255, 2**40]])
    drawing = draw({"rooms": numbers}, {**CLASSES, "colours": COLOURS})
    names = [text.rsplit(" ", 1)[0] for text, _ in drawing.legend]
    assert names == ["class -1", "wall", "class 255", f"class {2**40}"]
    assert len({tuple(colour) for colour in drawing.map[0]}) == 4
    mask = draw({"rooms": numbers > 0}, CLASSES)
    assert [text for text, _ in mask.legend] == ["wall 50%", "floor 50%"]


@pytest.mark.parametrize(
    ("classes", "rows"),
    [
        (np.array(2), [("kind", "lamp")]),
        (np.array([0, 1]), [("kind", "wall, floor")]),
        (np.array(b"lamp", object), [("kind", "lamp")]),
        (np.array([b"lamp"], object), [("kind", "lamp")]),
    ],
)
def test_the_classes_of_a_whole_image_are_named(classes, rows):
    assert draw({"kind": classes}, CLASSES).rows == rows


def test_a_map_lies_over_the_whole_picture_with_its_legend_below():
    picture = Image.new("RGB", (300, 90), "white")
    answer = {"rooms": probabilities([[0, 2]], count=3)}
    drawing = draw(answer, {**CLASSES, "colours": COLOURS})
    page = over(picture, drawing, opacity=1.0)
    assert page.size == (300, 90 + 2 * 20)
    assert page.getpixel((149, 89)) == (1, 2, 3)
    assert page.getpixel((150, 0)) == (7, 8, 9)
    assert page.getpixel((10, 90 + 10)) == (1, 2, 3)


OBJECTS = {"kind": "detection", "names": ["ball", "vase"], "drawn_from": 0.3}
ATTRIBUTES = {"kind": "attributes", "names": ["round", "tall", "red"]}


def detections(*found, size=5):
    """The answer for (box, class, score) of some objects, filled up to a size."""
    rows = [*found, *[((0, 0, 0, 0), -1, 0.0)] * (size - len(found))]
    return {
        "boxes": np.float32([box for box, _, _ in rows]),
        "classes": np.array([number for _, number, _ in rows]),
        "scores": np.float32([score for _, _, score in rows]),
        "num_detections": np.array(len(found)),
    }


FOUND = detections(
    ((10, 20, 90, 70), 1, 0.9), ((2, 1, 60, 50), 0, 0.3), ((0, 0, 5, 5), 0, 0.29)
)


def test_objects_are_drawn_from_a_score_with_their_classes():
    drawing = draw(FOUND, OBJECTS)
    assert [box.text for box in drawing.boxes] == ["1 vase 90%", "2 ball 30%"]
    assert drawing.boxes[0].corners == [10, 20, 90, 70]
    assert drawing.boxes[0].colour != drawing.boxes[1].colour
    assert drawing.legend == [(box.text, box.colour) for box in drawing.boxes]
    # Where nothing is said of them, those with an even chance, by number.
    assert [text for text, _ in draw(FOUND, {}).legend] == ["1 class 1 90%"]
    coloured = draw(FOUND, {**OBJECTS, "colours": COLOURS})
    assert coloured.boxes[0].colour == (40, 50, 60)


def test_objects_may_be_counted_and_numbered_in_floats():
    floats = {name: array.astype("float32") for name, array in FOUND.items()}
    assert draw(floats, OBJECTS) == draw(FOUND, OBJECTS)


@pytest.mark.parametrize("found", [[], [((1, 2, 3, 4), 0, 0.2)]])
@pytest.mark.parametrize("least", [0.0, 0.3])
def test_where_nothing_is_found_it_is_told_so(found, least):
    drawing = draw(detections(*found), {**OBJECTS, "drawn_from": least})
    if found and not least:
        assert len(drawing.boxes) == 1  # what fills up is no object
    else:
        told = [("nothing found", f"with a score of {least:.0%} or more")]
        assert (drawing.boxes, drawing.rows) == ([], told)


def test_objects_are_told_their_likely_attributes():
    asked = {}

    def ask(task, rois=None):
        asked[task] = rois
        if task == "objects":
            return {name: array[None] for name, array in FOUND.items()} | {"rois": 0}
        return {"kinds": np.float32([[[0.6, 0.1, 0.8], [0.4, 0.1, 0.2]]])}

    answers = {"objects": OBJECTS, "kinds": ATTRIBUTES, "rooms": CLASSES}
    drawing = answer(ask, "objects", answers)
    texts = [text for text, _ in drawing.legend]
    assert texts == ["1 vase 90%: red, round", "2 ball 30%: no attribute is likely"]
    answers["kinds"] = {**ATTRIBUTES, "drawn_from": 0.3}
    assert answer(ask, "objects", answers).legend[1][0] == "2 ball 30%: round"
    np.testing.assert_array_equal(asked.pop("kinds"), FOUND["boxes"][None, :2])
    assert asked == {"objects": None}
    assert drawn_with("kinds", answers) == "objects"
    assert drawn_with("rooms", answers) == "rooms"
    assert drawn_with("kinds", {"kinds": ATTRIBUTES}) == "kinds"


def test_boxes_lie_on_the_picture_which_is_large_enough_for_their_labels():
    drawing = draw(detections(((20, 30, 90, 70), 1, 0.9)), OBJECTS)
    page = over(Image.new("RGB", (100, 80), "white"), drawing)
    colour = drawing.boxes[0].colour
    assert page.size == (500, 5 * 80 + 20)
    on_border = [(100, 250), (450, 250), (300, 150), (300, 350)]
    assert [page.getpixel(place) for place in on_border] == 4 * [colour]
    assert page.getpixel((300, 250)) == page.getpixel((90, 250)) == (255, 255, 255)
    assert page.getpixel((101, 147)) == colour  # the label's ground, above the box


def test_the_likelier_of_two_boxes_is_above_the_other():
    corners = (20, 30, 90, 70), (20, 30, 60, 60)
    found = detections((corners[0], 1, 0.9), (corners[1], 0, 0.8))
    drawing = draw(found, OBJECTS)
    page = over(Image.new("RGB", (100, 80), "white"), drawing)
    assert page.getpixel((100, 250)) == drawing.boxes[0].colour
    assert page.getpixel((300, 250)) == drawing.boxes[1].colour


def test_a_picture_of_16_bits_is_as_bright_under_a_map():
    pixels = np.array([[0, 0x1FF, 0x8000, 0xFFFE]], "uint16")
    meaning = {"kind": "classes", "colours": [[0, 0, 0]]}
    drawing = draw({"rooms": probabilities([[0]], count=1)}, meaning)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    with Image.open(file) as picture:
        page = over(picture, drawing, opacity=0.0)
    assert [page.getpixel((i, 0))[0] for i in range(4)] == [0, 1, 128, 255]
