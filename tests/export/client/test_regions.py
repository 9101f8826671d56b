"""Pictures with regions, for a model that takes these; and what is recorded of one."""

import numpy as np
import pytest
import tensorflow as tf

from export import meanings
from export.client.regions import Pictures
from export.make.inputs import load_images
from export.make.savedmodel import export
from export.version import recorded
from keras_cross_stitch import selective_search


def near(box, expected, pixels):
    return np.abs(np.subtract(box, expected)).max() <= pixels


def test_a_picture_is_as_large_as_fits_and_regions_stay_on_their_objects(shapes):
    rois = np.array([[shapes.red, shapes.green]])
    inputs = Pictures([shapes.pixels], (48, 64), rois).inputs
    image, (red, green) = inputs["image"][0], inputs["rois"][0]
    assert image.shape == (48, 64, 3)
    assert image.dtype == inputs["rois"].dtype == np.float32
    # 200 rows become 48, and so 120 columns 29; what is right of them is filled up.
    assert not image[:, 29:].any()
    assert image[:, :29].any(axis=-1).all()
    for box, colour in ((red, (250, 10, 10)), (green, (10, 180, 10))):
        left, top, right, bottom = np.round(box).astype(int)
        inside = image[top + 1 : bottom - 1, left + 1 : right - 1]
        np.testing.assert_allclose(inside, np.broadcast_to(colour, inside.shape))
    outside = image[round(red[3]) + 2 : round(green[1]) - 1, :29]
    np.testing.assert_allclose(outside, 90)


def test_a_picture_of_the_models_size_is_given_as_it_is():
    image = np.random.default_rng(0).integers(256, size=(48, 64, 3)).astype("uint8")
    inputs = Pictures([image], (48, 64), [[[1, 2, 3, 4]]]).inputs
    np.testing.assert_array_equal(inputs["image"][0], image)
    np.testing.assert_array_equal(inputs["rois"], [[[1, 2, 3, 4]]])


def test_a_picture_is_made_smaller_as_the_signatures_of_files_do():
    image = np.random.default_rng(0).integers(256, size=(90, 130, 3)).astype("uint8")
    (given,) = Pictures([image], (48, 64), [[[1, 2, 3, 4]]]).inputs["image"]
    resized = tf.image.resize(image, (44, 64), antialias=True).numpy()
    np.testing.assert_array_equal(given[:44], resized.round())


def test_boxes_come_back_in_pixels_of_each_picture():
    rng = np.random.default_rng(1)
    sizes = [(31, 97), (200, 60), (48, 64)]
    images = [np.zeros((*size, 3), "uint8") for size in sizes]
    borders = np.array([(w, h, w, h) for h, w in sizes])[:, None]
    rois = rng.uniform(0, 1, (3, 7, 4)) * borders
    pictures = Pictures(images, (48, 64), rois)
    given = {"boxes": pictures.inputs["rois"][:, :3], "scores": np.ones((3, 3))}
    given["mailboxes"] = np.ones((3, 1, 4))  # a task of that name
    answer = pictures.in_their_pixels(given)
    np.testing.assert_allclose(answer["rois"], rois, rtol=1e-5)
    np.testing.assert_allclose(answer["boxes"], rois[:, :3], rtol=1e-5)
    np.testing.assert_array_equal(answer["scores"], given["scores"])
    np.testing.assert_array_equal(answer["mailboxes"], given["mailboxes"])
    # In `serving_default` they are the task's, and none is outside its picture.
    beyond = pictures.in_their_pixels({"detection_boxes": np.full((3, 1, 4), 999.0)})
    np.testing.assert_allclose(beyond["detection_boxes"], borders, rtol=1e-6)


def test_regions_are_proposed_where_none_are_given(shapes):
    small = shapes.pixels[:24, :32].copy()
    small[5:20, 6:25] = (10, 20, 250)
    pictures = Pictures([shapes.pixels, small], (48, 64))
    rois = pictures.inputs["rois"]
    # Not searched enlarged, which would find other boxes.
    found = 2 * selective_search(small)
    np.testing.assert_allclose(rois[1, : len(found)], found, rtol=1e-5)
    assert not rois[1, len(found) :].any()
    own = pictures.in_their_pixels({})["rois"]
    assert any(near(box, shapes.red, 5) for box in own[0])


def test_what_pictures_cannot_be_made_of_is_told(shapes):
    image = shapes.pixels
    for rois in ([[1, 2, 3, 4]], np.zeros((2, 5, 4)), np.zeros((1, 0, 4)), [[[1, 2]]]):
        message = r"boxes of each picture, \(1, R, 4\), R at least 1.* of shape \("
        with pytest.raises(ValueError, match=message):
            Pictures([image], (48, 64), rois)
    with pytest.raises(ValueError, match=r"a fixed size: .* \(None, 64\)"):
        Pictures([image], (None, 64))
    with pytest.raises(ValueError, match="at least one picture"):
        Pictures([], (48, 64))


def test_real_boxes_are_recorded_and_replayed(region_version, region_model):
    predictions = {
        signature: (given, outputs)
        for signature, given, outputs in recorded.read(
            region_version / recorded.RECORDED
        )
    }
    assert predictions.keys() == {"serving_default", "detection", "attributes"}
    given, outputs = predictions["detection"]
    # In the order of names, the plain picture is the first.
    assert outputs["num_detections"].tolist() == [0, 2]
    assert sorted(outputs["classes"][1, :2]) == [0, 1]
    expected = region_model.predict(given, verbose=0)["detection"]
    np.testing.assert_allclose(outputs["scores"], expected["scores"], atol=1e-5)
    assert len(recorded.read(region_version / recorded.WARMUP)) == 3
    assert meanings.of_version(region_version)["detection"]["names"] == ["red", "green"]


def test_from_jpeg_is_refused_before_anything_is_written(region_model_file, tmp_path):
    with pytest.raises(ValueError, match="--from-jpeg is not for a model that takes r"):
        export(region_model_file, tmp_path / "served", from_jpeg=True)
    assert not (tmp_path / "served").exists()


def test_an_array_is_not_enough_for_a_model_of_regions(region_model, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((2, 48, 64, 3)))
    with pytest.raises(ValueError, match=r"or with `image` and `rois`; a .npy file"):
        load_images(tmp_path / "x.npy", region_model)


def test_a_file_that_is_no_image_is_named(region_model, tmp_path):
    (tmp_path / "a.jpg").write_text("not an image")
    with pytest.raises(ValueError, match=r"a\.jpg is no JPEG or PNG image"):
        load_images(tmp_path, region_model)
