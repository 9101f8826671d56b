import sys

import cv2
import numpy as np
import pytest

from keras_cross_stitch import selective_search


def picture(seed=0, size=(90, 140), box=(30, 20, 95, 70)):
    """An RGB image with a rectangle of one colour before another."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 40, (*size, 3))
    left, top, right, bottom = box
    image[top:bottom, left:right] += np.array([200, 60, 120])
    return image.astype("uint8")


@pytest.mark.parametrize(
    ("size", "box"), [((90, 140), (30, 20, 95, 70)), ((121, 63), (5, 50, 60, 119))]
)
def test_an_object_is_found_in_pixels_of_the_image(size, box):
    boxes = selective_search(picture(1, size, box))
    height, width = size
    assert boxes.dtype == np.float64
    assert np.abs(boxes - box).max(axis=1).min() <= 1
    assert boxes.min() >= 0
    assert (boxes[:, 2:] <= [width, height]).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_opencv_is_given_its_own_order_of_colours(monkeypatch):
    given, resize = [], cv2.resize
    monkeypatch.setattr(
        "cv2.resize", lambda image, size: given.append(image) or resize(image, size)
    )
    selective_search(picture())
    np.testing.assert_array_equal(given[0], picture()[..., ::-1])


def test_the_largest_are_first_and_the_same_each_time():
    image = picture()
    boxes = selective_search(image)
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    assert (np.diff(areas) <= 1e-3).all()
    np.testing.assert_array_equal(boxes, selective_search(image))
    np.testing.assert_array_equal(boxes[:3], selective_search(image, most=3))


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (40, 3), (50, 60)])
def test_an_image_without_anything_has_one_box_the_whole(size):
    boxes = selective_search(np.full((*size, 3), 7, "uint8"))
    np.testing.assert_allclose(boxes, [[0, 0, size[1], size[0]]], rtol=1e-6)


@pytest.mark.parametrize(
    ("image", "received"),
    [
        (np.zeros((8, 8, 3)), r"shape=\(8, 8, 3\), dtype=float64"),
        (np.zeros((8, 8), "uint8"), r"shape=\(8, 8\), dtype=uint8"),
        (np.zeros((2, 8, 8, 3), "uint8"), r"shape=\(2, 8, 8, 3\)"),
        (np.zeros((0, 8, 3), "uint8"), r"shape=\(0, 8, 3\)"),
    ],
)
def test_what_is_no_image_is_an_error(image, received):
    with pytest.raises(
        ValueError, match=rf"\(H, W, 3\) of uint8. Received: {received}"
    ):
        selective_search(image)


@pytest.mark.parametrize("missing", ["cv2", "cv2.ximgproc"])
def test_without_opencv_it_is_told_what_to_install(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "cv2.ximgproc":  # OpenCV without its contributed modules
        monkeypatch.delattr("cv2.ximgproc")
    with pytest.raises(ImportError, match="pip install opencv-contrib-python-headless"):
        selective_search(picture())
