import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

from training import recipes
from training.batches import regions
from training.datasets import proposals, voc2008
from training.datasets.voc2008 import ATTRIBUTES, CLASSES, Voc2008

pytestmark = pytest.mark.xdist_group("voc2008")

SIZE = (256, 190)  # of the test images: width, height


def line(image, name, box, on=(), difficult=0):
    attributes = ["1" if x in on else "0" for x in ATTRIBUTES]
    return " ".join([image, name, *map(str, box), *attributes, str(difficult)])


LINES = {
    "train": [
        line("a.jpg", "dog", (10.5, 20, 100.25, 150), on=("Furry", "Leather")),
        line("b.jpg", "train", (0, 0, 256, 190), on=("2D Boxy",)),
        line("a.jpg", "person", (200, 10, 250, 180), difficult=1),
    ],
    "test": ["d.jpg", line("c.jpg", "aeroplane", (60, 40, 200, 150), on=("Wing",))],
}


def picture(rng, box):
    """A noisy wall with a plain rectangle of another colour."""
    image = rng.normal(150, 3, (SIZE[1], SIZE[0], 3))
    left, top, right, bottom = np.round(box).astype(int)
    image[top:bottom, left:right] = (40, 90, 200)
    return image.clip(0, 255).astype("uint8")


def write(folder, lines=LINES):
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    for name in "abcd":
        image = picture(rng, (60, 40, 200, 150))
        cv2.imwrite(str(folder / f"images/{name}.jpg"), image)
    for split, of_split in lines.items():
        (folder / f"apascal_{split}.txt").write_text("\n".join(of_split) + "\n")
    (folder / "format.txt").write_text(voc2008.FORMAT_2)
    (folder / "class_names.txt").write_text("\n".join(CLASSES) + "\n")
    (folder / "attribute_names.txt").write_text("\n".join(ATTRIBUTES) + "\n")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("voc") / "voc2008")


def test_the_data_at_hand_is_whole():
    path = Path(__file__).parents[3] / "shared/data"
    path = Path(os.environ.get("KCS_DATA", path)) / "voc2008"
    if not path.exists():
        pytest.skip(
            f"needs VOC 2008: set KCS_DATA to the folder that has it, not {path}"
        )
    found = voc2008.check_folder(path)
    counts = {
        split: (len(objects), sum(map(len, objects.values())))
        for split, objects in found.items()
    }

    assert counts == {"train": (2111, 6337), "test": (2221, 6347)}
    boxes = np.array(
        [x["box"] for of in found.values() for y in of.values() for x in y]
    )
    # Without the subtraction no box would begin at 0, and hundreds at 256 / 500.
    assert (boxes[:, :2] < 0.01).sum(axis=0).tolist() == [1514, 775]


@pytest.fixture(scope="module")
def builder(folder, tmp_path_factory):
    builder = Voc2008(config="full", data_dir=str(tmp_path_factory.mktemp("data")))
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=str(folder))
    )
    return builder


def test_examples_are_the_images_and_their_lines(builder, folder):
    train, test = (
        {x["id"].decode(): x for x in tfds.as_numpy(builder.as_dataset(split=split))}
        for split in ("train", "test")
    )

    assert set(train) == {"a", "b"}
    assert set(test) == {"c", "d"}
    dog, person = (0, 1) if train["a"]["objects"]["label"][0] == 11 else (1, 0)
    objects = train["a"]["objects"]
    assert objects["label"][[dog, person]].tolist() == [11, 14]
    assert objects["difficult"][[dog, person]].tolist() == [0, 1]
    pixels = objects["bbox"][dog] * [190, 256, 190, 256]
    np.testing.assert_allclose(pixels, [20, 10.5, 150, 100.25], rtol=1e-5)
    on = [ATTRIBUTES[k] for k in objects["attributes"][dog].nonzero()[0]]
    assert on == ["Furry", "Leather"]
    assert train["a"]["image"].shape == (190, 256, 3)
    assert test["d"]["objects"]["bbox"].shape == (0, 4)  # legal: no objects


def test_the_lists_are_those_of_the_data_at_hand():
    assert (len(CLASSES), len(ATTRIBUTES)) == (20, 64)
    assert len(set(ATTRIBUTES)) == 64


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (line("b.jpg", "tram", (1, 2, 3, 4)), "class of aeroplane.*Received: tram"),
        (line("b.jpg", "car", (1, 2, 3, 4)) + " 1", "64 attributes.*70 fields"),
        (line("b.jpg", "car", (1, 2, 3, 4))[:-2], "64 attributes.*68 fields"),
        (
            line("b.jpg", "car", (1, 2, 257, 4)),
            "inside its image of 256x190.*1 2 257 4",
        ),
        (line("b.jpg", "car", (1, -2, 3, 4)), "inside its image of 256x190"),
        (line("b.jpg", "car", (1, 2, 3, 190.5)), "inside its image of 256x190"),
        (line("b.jpg", "car", (3, 2, 3, 4)), "inside its image.*Received: 3 2 3 4"),
        (line("b.jpg", "car", (1, 2, "nan", 4)), "Received: 1 2 nan 4"),
        (line("b.jpg", "car", (1, 2, "x", 4)), "Received: 1 2 x 4"),
        (line("b.jpg", "car", (1, 2, 3, 4))[:-1] + "2", "0 or 1. Received: 2"),
        (line("z.jpg", "car", (1, 2, 3, 4)), "no image .*z.jpg"),
        ("", "no image .*images, or"),
    ],
)
def test_a_wrong_line_is_refused_with_its_number(tmp_path, wrong, message):
    lines = {**LINES, "train": [*LINES["train"], wrong]}
    path = write(tmp_path / "voc", lines)

    with pytest.raises(ValueError, match=rf"apascal_train.txt, line 4: .*{message}"):
        voc2008.check_folder(path)


def test_boxes_of_a_folder_without_a_format_begin_at_vocs_first_pixel(tmp_path):
    on = ("Furry",)
    lines = [
        line("a.jpg", "dog", (0.51, 20, 256, 150), on),
        line("b.jpg", "cat", [9] * 4),
    ]
    path = write(tmp_path / "voc", {**LINES, "train": [x[:-2] for x in lines]})
    of_test = (path / "apascal_test.txt").read_text().replace(" 0\n", "\n")
    (path / "apascal_test.txt").write_text(of_test)
    (path / "format.txt").unlink()
    (dog,), (cat,) = voc2008.check_folder(path)["train"].values()

    np.testing.assert_allclose(dog["box"], [0, 20 - 256 / 500, 256, 150], atol=0.003)
    np.testing.assert_allclose(cat["box"], [9 - 256 / 500] * 2 + [9, 9])  # one pixel
    assert (dog["attributes"].sum(), dog["difficult"]) == (1, 0)
    (path / "apascal_train.txt").write_text(line("a.jpg", "dog", (0, 0, 9, 9))[:-2])
    with pytest.raises(ValueError, match=r"256x190 pixels, from 0\.512 on.* 0 0 9 9"):
        voc2008.check_folder(path)
    (path / "format.txt").write_text("boxes of another kind")
    with pytest.raises(ValueError, match=r"format\.txt to say 'boxes from 0.*prepare"):
        voc2008.check_folder(path)


def test_an_incomplete_folder_is_refused(tmp_path):
    path = write(tmp_path / "voc")
    (path / "attribute_names.txt").write_text("\n".join(ATTRIBUTES[:-1]))
    with pytest.raises(ValueError, match=r"64 names .*Received 63.*\['Leather'\]"):
        voc2008.check_folder(path)
    (path / "apascal_test.txt").unlink()
    with pytest.raises(ValueError, match=r"Missing: .*apascal_test.txt.*prepare voc2"):
        voc2008.check_folder(path)
    write(tmp_path / "other", {**LINES, "test": LINES["train"]})
    with pytest.raises(ValueError, match=r"In both are 2, the first: a\.jpg"):
        voc2008.check_folder(tmp_path / "other")


def test_a_truncated_image_is_refused(folder, tmp_path):
    path = tmp_path / "b.jpg"
    path.write_bytes((folder / "images/b.jpg").read_bytes()[:-300])

    with pytest.raises(ValueError, match=r"whole JPEG image in .*b\.jpg"):
        voc2008.read_example(path, [])


def annotate(devkit, image, *objects):
    names = ("xmin", "ymin", "xmax", "ymax")
    parts = [
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>"
        + "".join(f"<{x}>{y}</{x}>" for x, y in zip(names, box, strict=True))
        + "</bndbox></object>"
        for name, difficult, box in objects
    ]
    path = devkit / f"Annotations/{image}.xml"
    path.write_text(f"<annotation>{''.join(parts)}</annotation>")


@pytest.fixture
def official(folder, tmp_path):
    """A devkit and aPascal's files: larger images, `e` without objects."""
    devkit, apascal = tmp_path / "VOC2008", tmp_path / "attribute_data"
    (devkit / "JPEGImages").mkdir(parents=True)
    (devkit / "ImageSets/Main").mkdir(parents=True)
    (devkit / "Annotations").mkdir()
    apascal.mkdir()
    rng = np.random.default_rng(0)
    for name in "abe":
        image = rng.integers(0, 255, (375, 500, 3), "uint8")
        cv2.imwrite(str(devkit / f"JPEGImages/{name}.jpg"), image)
    (devkit / "ImageSets/Main/train.txt").write_text("a\ne\n")
    (devkit / "ImageSets/Main/val.txt").write_text("b\n")
    box = (101, 76, 500, 375)
    small = (1, 1, 100, 75)
    cow, calf = line("a.jpg", "cow", box, ["Tail"]), line("a.jpg", "cow", small)
    (apascal / "apascal_train.txt").write_text(f"{cow[:-2]}\n{calf[:-2]}\n")
    (apascal / "apascal_test.txt").write_text(line("b.jpg", "cat", box)[:-2])
    annotate(devkit, "a", ("cow", 0, box), ("cow", 1, small), ("dog", 1, box))
    annotate(devkit, "b", ("cat", 0, small))
    (apascal / "attribute_names.txt").write_text("\n".join(ATTRIBUTES))
    return devkit, apascal


def test_the_official_files_become_that_folder(official, tmp_path, capsys):
    voc2008.prepare_from_devkit(*official, tmp_path / "folder")
    found = voc2008.check_folder(tmp_path / "folder")

    assert {split: list(x) for split, x in found.items()} == {
        "train": ["a.jpg", "e.jpg"],
        "test": ["b.jpg"],
    }
    assert found["train"]["e.jpg"] == []
    cow, calf = found["train"]["a.jpg"]
    np.testing.assert_allclose(calf["box"], [0, 0, 51.2, 38.4], atol=0.01)
    assert (cow["difficult"], calf["difficult"]) == (0, 1)
    assert found["test"]["b.jpg"][0]["difficult"] == 0
    assert "1 of aPascal's objects are none of VOC's" in capsys.readouterr().out
    np.testing.assert_allclose(cow["box"], [51.2, 38.4, 256, 192], atol=0.01)
    assert cow["label"] == CLASSES.index("cow")
    assert cow["attributes"].sum() == cow["attributes"][ATTRIBUTES.index("Tail")] == 1
    assert cv2.imread(str(tmp_path / "folder/images/a.jpg")).shape == (192, 256, 3)


def test_what_is_missing_of_the_official_files_is_named(official, tmp_path):
    devkit, apascal = official
    with pytest.raises(ValueError, match=r"content\. Remove it or choose another"):
        voc2008.prepare_from_devkit(devkit, apascal, apascal)
    whole = (devkit / "Annotations/a.xml").read_text()
    (devkit / "Annotations/a.xml").write_text(whole[:-20])
    with pytest.raises(
        ValueError, match=r"annotation of .*a\.xml\. ParseError.*Unpack"
    ):
        voc2008.prepare_from_devkit(devkit, apascal, tmp_path / "folder")
    (apascal / "apascal_train.txt").write_text(line("a.jpg", "elk", (1, 2, 3, 4)))
    with pytest.raises(ValueError, match=r"apascal_train.txt, line 1: .*elk"):
        voc2008.prepare_from_devkit(devkit, apascal, tmp_path / "folder")
    (devkit / "ImageSets/Main/val.txt").unlink()
    with pytest.raises(ValueError, match=r"Missing: .*val\.txt"):
        voc2008.prepare_from_devkit(devkit, apascal, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_proposals_hold_the_object_the_largest_first():
    image = picture(np.random.default_rng(0), (60, 40, 200, 150))
    boxes = proposals.search(image)
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)

    expected = np.array([40, 60, 150, 200]) / [190, 256, 190, 256]
    assert np.abs(boxes - expected).max(axis=1).min() < 0.02
    assert (np.diff(areas) <= 1e-6).all()
    assert boxes.min() >= 0
    assert boxes.max() <= 1
    np.testing.assert_array_equal(boxes, proposals.search(image))
    np.testing.assert_array_equal(boxes[:5], proposals.search(image, most=5))


def test_proposals_are_searched_once_and_their_recall_is_told(builder, capsys):
    proposals.prepare(builder, ("train", "test"))
    told = capsys.readouterr().out

    found = {split: proposals.load(builder, split) for split in ("train", "test")}
    assert [x.shape[0] for x in found.values()] == [2, 2]
    assert proposals.recall(builder, "test") == 1.0  # the aeroplane is the rectangle
    assert "test: " in told
    assert "recall at IoU 0.5: 1.000" in told
    proposals.prepare(builder, ("train", "test"))
    assert not capsys.readouterr().out


def test_what_is_difficult_and_how_many_proposals_reach_the_batches(
    builder, monkeypatch
):
    few = recipes.change(recipes.find("voc2008"), "data", proposals=3).data
    found = np.tile(np.float32([0, 0, 0.5, 1]), (2, 9, 1))
    monkeypatch.setattr(proposals.np, "load", lambda path: found)
    examples = list(regions._examples(builder, "train", few))

    difficult = {
        CLASSES[k]: bool(x)
        for _, found in examples
        for k, x in zip(found["labels"], found["difficult"], strict=True)
    }
    assert difficult == {"dog": False, "person": True, "train": False}
    assert [len(found["proposals"]) for _, found in examples] == [3, 3]


def test_recall_is_the_share_of_objects_that_a_proposal_overlaps(builder, monkeypatch):
    of_a, of_b = (0.1, 0.05, 0.8, 0.4), (0, 0, 0.6, 1)  # the dog, and the train
    ids = [x["id"] for x in tfds.as_numpy(builder.as_dataset(split="train"))]
    boxes = {b"a": [(0.9, 0.9, 1, 1), of_a], b"b": [(0, 0, 0.4, 1), of_b]}
    found = np.float32([boxes[x] for x in ids])
    monkeypatch.setattr(proposals, "load", lambda *args: found[:, : args[2]])

    # The person has none.
    assert proposals.recall(builder, "train") == pytest.approx(2 / 3)
    assert proposals.recall(builder, "train", most=1) == 0


def test_boxes_without_area_fill_up():
    padded = proposals.pad([np.ones((2, 4)), np.zeros((0, 4))])

    assert padded.shape == (2, 2, 4)
    assert not padded[1].any()
