"""PASCAL VOC 2008 with the attributes of aPascal, as a TFDS data set.

The builder reads a plain folder; `prepare_from_devkit` writes that folder from the
official files. Nothing is downloaded here. The split that is called test is VOC's val,
as aPascal has it: the labels of VOC 2008's own test were never given out.

VOC counts pixels from 1, and a box holds its last ones. Here a box begins at 0 and ends
before its right and bottom, so that right - left is its width.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar
from xml.etree import ElementTree

import cv2
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image
from rich.console import Console
from rich.progress import track

from training.datasets.files import check_names, new_folder, read_as, read_lines

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair"),
    *("cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant"),
    *("sheep", "sofa", "train", "tvmonitor"),
)
ATTRIBUTES = (
    *("2D Boxy", "3D Boxy", "Round", "Vert Cyl", "Horiz Cyl", "Occluded", "Tail"),
    *("Beak", "Head", "Ear", "Snout", "Nose", "Mouth", "Hair", "Face", "Eye", "Torso"),
    *("Hand", "Arm", "Leg", "Foot/Shoe", "Wing", "Propeller", "Jet engine", "Window"),
    *("Row Wind", "Wheel", "Door", "Headlight", "Taillight", "Side mirror", "Exhaust"),
    *("Pedal", "Handlebars", "Engine", "Sail", "Mast", "Text", "Label", "Furn. Leg"),
    *("Furn. Back", "Furn. Seat", "Furn. Arm", "Horn", "Rein", "Saddle", "Leaf"),
    *("Flower", "Stem/Trunk", "Pot", "Screen", "Skin", "Metal", "Plastic", "Wood"),
    *("Cloth", "Furry", "Glass", "Feather", "Wool", "Clear", "Shiny", "Vegetation"),
    "Leather",
)
LONGEST = 256  # pixels of an image's longer side
OFFICIAL_LONGEST = 500  # of VOC's own, all but a few of them
FORMAT = "format.txt"
# What that file says of the lines. A folder without it has VOC's boxes, scaled alone.
FORMAT_2 = "boxes from 0, right and bottom exclusive; a last number, 1: difficult"
SPLITS = {"train": "train", "test": "val"}  # aPascal's, and VOC's
LISTS = {"class_names.txt": CLASSES, "attribute_names.txt": ATTRIBUTES}
NAMES = "names of VOC 2008 and aPascal"
REMEDY = "Write the folder with `python -m training prepare voc2008`"


def check_folder(path: str | os.PathLike) -> dict[str, dict[str, list[dict]]]:
    """Reads and checks a folder's text files, and opens its images as far as to size.

    Args:
        path: The folder with `images`, `apascal_train.txt`, `apascal_test.txt`,
            `class_names.txt` and `attribute_names.txt`. Without a `format.txt`, as
            earlier versions wrote it, boxes are VOC's, whose first pixel is 1.

    Returns:
        `{split: {image: [object, ...]}}`, an object being a dict of `box` (left, top,
        right, bottom in pixels, from 0), `label`, `attributes` and `difficult`. An
        image may have none.

    Raises:
        ValueError: If a file is missing or wrong; for a line, with its number.
    """
    folder = Path(path)
    files = ["images", *LISTS, *(f"apascal_{split}.txt" for split in SPLITS)]
    for name in files:
        if not (folder / name).exists():
            raise ValueError(
                f"Expected the VOC 2008 folder {folder} with {', '.join(files)}. "
                f"Missing: {folder / name}. {REMEDY}"
            )
    for name, expected in LISTS.items():
        check_names(folder / name, expected, NAMES, REMEDY)
    first, flagged = LONGEST / OFFICIAL_LONGEST, False
    if (folder / FORMAT).exists():
        first, flagged = 0.0, True
        if read_lines(folder / FORMAT, REMEDY) != [FORMAT_2]:
            raise ValueError(
                f"Expected {folder / FORMAT} to say '{FORMAT_2}', as this version "
                f"writes it. {REMEDY}"
            )
    objects = {
        split: read_objects(
            folder / f"apascal_{split}.txt", folder / "images", first, flagged
        )
        for split in SPLITS
    }
    both = objects["train"].keys() & objects["test"].keys()
    if both:
        raise ValueError(
            f"Expected each image of {folder} in one split. In both are {len(both)}, "
            f"the first: {min(both)}. {REMEDY}"
        )
    return objects


def read_objects(
    path: Path, images: Path, first: float, flagged: bool
) -> dict[str, list[dict]]:
    """Reads `<image> <class> xmin ymin xmax ymax <64 x 0/1>`, a line an object.

    A line with an image alone names one without objects.

    Args:
        path: The file.
        images: The folder of its images.
        first: What the file calls the left and top of an image's first pixel.
        flagged: Whether a last 0 or 1 says if the object is difficult.
    """
    objects: dict[str, list[dict]] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for number, line in enumerate(read_lines(path, REMEDY), 1):
        image, *fields = line.split() or [""]
        with _line_named(path, number):
            if image not in sizes:
                sizes[image] = _size(images / image)
                objects[image] = []
            if fields:
                thing = _object(fields, *sizes[image], first, flagged)
                objects[image].append(thing)
    return objects


@contextlib.contextmanager
def _line_named(path: Path, number: int) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}") from error


def _size(path: Path) -> tuple[int, int]:
    """(width, height), from the first bytes of the file."""
    try:
        with Image.open(path) as image:
            return image.size
    except OSError as error:
        raise ValueError(f"There is no image {path}, or it is damaged") from error


def _object(
    fields: list[str], width: int, height: int, first: float, flagged: bool
) -> dict[str, Any]:
    name, *numbers = fields
    expected = 4 + len(ATTRIBUTES) + flagged
    if name not in CLASSES:
        raise ValueError(f"Expected a class of {', '.join(CLASSES)}. Received: {name}")
    if len(numbers) != expected:
        raise ValueError(
            f"Expected 4 numbers of a box and {len(ATTRIBUTES)} attributes"
            f"{', and whether it is difficult,' if flagged else ''} behind the class. "
            f"Received: {len(numbers)} fields"
        )
    try:
        box = np.array(numbers[:4], np.float64)
    except ValueError:
        box = np.full(4, np.nan)
    box[:2] -= first
    left, top, right, bottom = box
    # Files written with two decimals may reach beyond by half of the last one.
    if not (
        -0.01 <= left < right <= width + 0.01 and -0.01 <= top < bottom <= height + 0.01
    ):
        raise ValueError(
            f"Expected a box xmin ymin xmax ymax inside its image of {width}x{height} "
            f"pixels, from {first:g} on. Received: {' '.join(numbers[:4])}"
        )
    if set(numbers[4:]) - {"0", "1"}:
        wrong = next(x for x in numbers[4:] if x not in ("0", "1"))
        raise ValueError(f"Expected an attribute of 0 or 1. Received: {wrong}")
    return {
        "box": box.clip(0, [width, height, width, height]),
        "label": CLASSES.index(name),
        "attributes": np.array(numbers[4 : 4 + len(ATTRIBUTES)], np.uint8),
        "difficult": int(numbers[-1]) if flagged else 0,
    }


@dataclasses.dataclass(eq=False)
class Voc2008Config(tfds.core.BuilderConfig):
    """How many images to take of each split, from its start; `None` is all."""

    train: int | None = None
    test: int | None = None


class Voc2008(tfds.core.GeneratorBasedBuilder):
    """VOC 2008's images of 256 pixels, their objects' boxes, classes and attributes.

    Each example is `{"image", "objects", "id"}`. A box is (ymin, xmin, ymax, xmax), as
    shares of the image; the attributes are 64 numbers 0 or 1; what is difficult counts
    neither as found nor as missed.
    """

    VERSION = tfds.core.Version("2.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {
        "2.0.0": "Boxes begin at pixel 0, where they began at 1; `difficult` is new."
    }
    BUILDER_CONFIGS: ClassVar[list[tfds.core.BuilderConfig]] = [
        Voc2008Config(name="full", description="All images."),
        Voc2008Config(name="toy", description="For tests.", train=16, test=8),
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Get the VOC 2008 development kit with its images from "
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2008/ and aPascal's attribute_data "
        "from https://vision.cs.uiuc.edu/attributes/, turn them into a folder with "
        "`python -m training prepare voc2008`, and give that folder as manual_dir. It "
        "holds images/*.jpg (the longer side 256 pixels), apascal_train.txt and "
        "apascal_test.txt (a line an object: image, class, xmin, ymin, xmax, ymax in "
        "pixels, 64 attributes of 0 or 1, 1 if it is difficult; an image alone has no "
        "object), class_names.txt, attribute_names.txt and format.txt."
    )
    attribute_names = ATTRIBUTES

    def _info(self) -> tfds.core.DatasetInfo:
        thing = {
            "bbox": tfds.features.BBoxFeature(),
            "label": tfds.features.ClassLabel(names=list(CLASSES)),
            "attributes": tfds.features.Tensor(
                shape=(len(ATTRIBUTES),), dtype=np.uint8
            ),
            "difficult": tfds.features.Scalar(dtype=np.uint8),
        }
        features = {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "objects": tfds.features.Sequence(thing),
            "id": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(features),
            homepage="http://host.robots.ox.ac.uk/pascal/VOC/voc2008/",
            citation="""@inproceedings{farhadi2009describing,
  title={Describing Objects by their Attributes},
  author={Farhadi, Ali and Endres, Ian and Hoiem, Derek and Forsyth, David},
  booktitle={IEEE Conference on Computer Vision and Pattern Recognition},
  year={2009}
}""",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        folder = Path(dl_manager.manual_dir)
        objects = check_folder(folder)
        return {
            split: self._generate_examples(
                folder / "images", of_split, getattr(self.builder_config, split)
            )
            for split, of_split in objects.items()
        }

    def _generate_examples(
        self, images: Path, objects: dict, most: int | None
    ) -> Iterator:
        for name in list(objects)[:most]:
            yield name, read_example(images / name, objects[name])


BUILDER = Voc2008


def read_example(path: Path, objects: list[dict]) -> dict[str, Any]:
    """An image and its objects as an example of `Voc2008`, the image encoded."""
    encoded = path.read_bytes()
    try:
        # Training decodes with TensorFlow, which refuses files that others mend.
        height, width, _ = tf.io.decode_jpeg(encoded, channels=3).shape
    except tf.errors.InvalidArgumentError as error:
        raise ValueError(
            f"Expected a whole JPEG image in {path}, which is truncated or damaged. "
            "Write the file anew."
        ) from error
    size = np.array([height, width, height, width])
    return {
        "image": encoded,
        "objects": [
            {
                "bbox": tfds.features.BBox(*(thing["box"][[1, 0, 3, 2]] / size)),
                "label": thing["label"],
                "attributes": thing["attributes"],
                "difficult": thing["difficult"],
            }
            for thing in objects
        ],
        "id": path.stem,
    }


def prepare_from_devkit(
    devkit: str | os.PathLike,
    apascal: str | os.PathLike,
    directory: str | os.PathLike,
) -> None:
    """Writes the folder that `Voc2008` reads from the official files.

    The folder appears when it is complete, and not before. Which objects are difficult
    is what the devkit's Annotations say of the box of that class that is the same.

    Args:
        devkit: `VOCdevkit/VOC2008`, with `JPEGImages`, `Annotations` and
            `ImageSets/Main`.
        apascal: aPascal's `attribute_data`, with `apascal_train.txt`,
            `apascal_test.txt`, `class_names.txt` and `attribute_names.txt`.
        directory: The folder to write; must not exist, or be empty.

    Raises:
        ValueError: If a file is not what it should be, or the folder has content.
    """
    devkit, apascal = Path(devkit), Path(apascal)
    with new_folder(Path(directory)) as folder:
        for path in (
            devkit / "JPEGImages",
            devkit / "Annotations",
            *(devkit / "ImageSets/Main" / f"{name}.txt" for name in SPLITS.values()),
            *(apascal / f"apascal_{split}.txt" for split in SPLITS),
            apascal / "attribute_names.txt",
        ):
            if not path.exists():
                raise ValueError(
                    f"Expected the VOC 2008 devkit in {devkit} and aPascal's files in "
                    f"{apascal}. Missing: {path}"
                )
        check_names(apascal / "attribute_names.txt", ATTRIBUTES, NAMES, REMEDY)
        objects = {
            split: {
                **dict.fromkeys(_listed(devkit, voc), ()),
                **read_objects(
                    apascal / f"apascal_{split}.txt", devkit / "JPEGImages", 1.0, False
                ),
            }
            for split, voc in SPLITS.items()
        }
        unknown = sum(
            _mark_difficult(of_image, devkit / "Annotations" / f"{Path(name).stem}.xml")
            for of_split in objects.values()
            for name, of_image in of_split.items()
        )
        (folder / "images").mkdir()
        for name, names in LISTS.items():
            (folder / name).write_text("\n".join(names) + "\n", "utf-8")
        (folder / FORMAT).write_text(f"{FORMAT_2}\n", "utf-8")
        for split, of_split in objects.items():
            lines = []
            for name in track(of_split, f"Writing VOC 2008, {split}"):
                scale = _shrink(devkit / "JPEGImages" / name, folder / "images" / name)
                lines += [name] if not of_split[name] else []
                lines += [_line(name, thing, scale) for thing in of_split[name]]
            (folder / f"apascal_{split}.txt").write_text(
                "\n".join(lines) + "\n", "utf-8"
            )
        check_folder(folder)
    if unknown:
        Console().print(
            f"{unknown} of aPascal's objects are none of VOC's Annotations: taken as "
            "not difficult"
        )


def _listed(devkit: Path, name: str) -> list[str]:
    lines = read_lines(devkit / "ImageSets/Main" / f"{name}.txt", "Unpack it anew")
    return [f"{x}.jpg" for line in lines for x in line.split()]


def _mark_difficult(objects: Sequence[dict], path: Path) -> int:
    """Sets `difficult` as an image's annotation has it; returns how many it lacks."""
    if not objects:
        return 0
    annotated: dict[tuple, int] = {}
    thing: Any  # of the annotation, then of aPascal
    with read_as("the annotation of an image", path, "Unpack the devkit anew"):
        for thing in ElementTree.parse(path).getroot().iter("object"):
            edges = (
                thing.findtext(f"bndbox/{x}", "")
                for x in ("xmin", "ymin", "xmax", "ymax")
            )
            box = tuple(round(float(x)) for x in edges)
            difficult = int(thing.findtext("difficult", "0"))
            annotated[thing.findtext("name"), box] = difficult
    lacking = 0
    for thing in objects:
        left, top, right, bottom = np.round(thing["box"]).astype(int).tolist()
        key = CLASSES[thing["label"]], (left + 1, top + 1, right, bottom)
        thing["difficult"] = annotated.get(key, 0)
        lacking += key not in annotated
    return lacking


def _shrink(source: Path, target: Path) -> tuple[float, float]:
    """Writes the image, its longer side `LONGEST`, and returns (x scale, y scale)."""
    image = cv2.imread(os.fspath(source))
    if image is None:
        raise ValueError(f"Expected a JPEG image in {source}. It is damaged")
    height, width = image.shape[:2]
    share = LONGEST / max(height, width)
    size = max(1, round(width * share)), max(1, round(height * share))
    resized = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    if not cv2.imwrite(os.fspath(target), resized, [cv2.IMWRITE_JPEG_QUALITY, 95]):
        raise OSError(f"Could not write {target}. Is the disk full?")
    return size[0] / width, size[1] / height


def _line(name: str, thing: dict[str, Any], scale: tuple[float, float]) -> str:
    box = " ".join(f"{x:.2f}" for x in thing["box"] * [*scale, *scale])
    attributes = " ".join(map(str, thing["attributes"]))
    of_class = CLASSES[thing["label"]]
    return f"{name} {of_class} {box} {attributes} {thing['difficult']}"
