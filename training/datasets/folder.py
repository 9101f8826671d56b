"""A data set of one's own: images and label maps in sub-folders, and no class to write.

    leaves/
        images/train/0001.jpg ...     images/test/...      RGB, JPEG or PNG
        parts/train/0001.png ...      parts/test/...       a class in each pixel
        parts/classes.txt                                  a name a line, 0 the first
        depth/train/0001.png ...      depth/test/...       millimetres, 16 bits
        normals/train/0001.png ...    normals/test/...     RGB, (n + 1) / 2 * 255

All are of one size. 255 is a pixel without a class, 0 one without depth, and (0, 0, 0)
one without a normal. A sub-folder is a feature, of which a recipe makes a task:
`parts:segmentation`, `depth`, `normals`.
"""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from training.datasets.files import files_in, read_lines
from training.datasets.images import (
    VOID,
    is_jpeg,
    orientation,
    read_image,
    stored_as,
)

SPLITS = ("train", "test")
_TOY = {"train": 16, "test": 8}


@dataclasses.dataclass(eq=False)
class FolderConfig(tfds.core.BuilderConfig):
    """Where the files are, or `None` where prepared data say themselves what they have.

    `most` limits the images of each split.
    """

    folder: Path | None = None
    most: dict[str, int] = dataclasses.field(default_factory=dict)


def config(recipe: str, size: str, source: Path | None) -> FolderConfig:
    """The prepared data of a folder have the name of the recipe's file."""
    most = _TOY if size == "toy" else {}
    return FolderConfig(name=f"{recipe}_{size}", folder=source, most=most)


def check_folder(path: str | os.PathLike) -> dict[str, list[str]]:
    """Checks that each image has its label maps, without opening them.

    Args:
        path: The folder.

    Returns:
        The names of each split's images, without their endings.

    Raises:
        ValueError: If a file is missing or superfluous, or a list of classes is none.
    """
    folder = Path(path)
    images = {split: _files(folder / "images" / split) for split in SPLITS}
    for feature in _features(folder):
        if feature in ("id", "image"):
            raise ValueError(
                "Expected labels of another name than 'id' and 'image', as which an "
                f"image's name and itself are kept. Received: {folder / feature}. "
                "Rename it"
            )
        if (folder / feature / "classes.txt").exists():
            _classes(folder / feature)
        for split in SPLITS:
            labels = _files(folder / feature / split)
            if alone := sorted(images[split].keys() ^ labels.keys()):
                one = {**labels, **images[split]}[alone[0]]
                has_image = alone[0] in images[split]
                other = folder / (feature if has_image else "images")
                raise ValueError(
                    f"Expected a label map in {folder / feature} for each image. "
                    f"{len(alone)} have no partner, the first: {one} has none in "
                    f"{other / split}. Add it, or remove the other"
                )
    return {split: sorted(of_split) for split, of_split in images.items()}


class Folder(tfds.core.GeneratorBasedBuilder):
    """Images and label maps of a folder."""

    VERSION = tfds.core.Version("1.0.0")
    builder_config: FolderConfig

    def _info(self) -> tfds.core.DatasetInfo:
        folder = self.builder_config.folder
        features = folder and {**_described(folder), "id": tfds.features.Text()}
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=features and tfds.features.FeaturesDict(features),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        most = self.builder_config.most
        folder = Path(self.builder_config.folder or "")
        return {
            split: self._generate_examples(folder, split, names[: most.get(split)])
            for split, names in check_folder(folder).items()
        }

    def _generate_examples(
        self, folder: Path, split: str, names: list[str]
    ) -> Iterator[tuple]:
        images = _files(folder / "images" / split)
        labels = {x: _files(folder / x / split) for x in _features(folder)}
        described = self.info.features
        seen: dict[str, set[int]] = {}  # the classes of the label maps so far
        for name in names:
            _read(images[name], described["image"], folder)
            if (turned := orientation(images[name])) > 1:
                raise ValueError(
                    f"Expected an upright image in {images[name]}. Received: EXIF "
                    f"orientation {turned}, which training does not apply. Write the "
                    "image as its label maps are, by PIL.ImageOps.exif_transpose, say"
                )
            maps = {
                feature: _read(files[name], described[feature], folder)
                for feature, files in labels.items()
            }
            for feature, stored in maps.items():
                if isinstance(described[feature], tfds.features.LabeledImage):
                    seen.setdefault(feature, set()).update(np.unique(stored).tolist())
            # The file as it is: a JPEG stays one.
            yield name, {"image": images[name].read_bytes(), **maps, "id": name}
        # A toy's few images may have one class alone.
        whole = split == "train" and not self.builder_config.most
        for feature, values in seen.items():
            if whole and len(values - {VOID}) < 2:
                found = " and ".join(map(str, sorted(values)))
                raise ValueError(
                    f"Expected two classes or more in {folder / feature / split}. "
                    f"Received: {found} in all their pixels, and {VOID} is none. "
                    "Write the class in each pixel: 0 and 1, say, in a mask"
                )


BUILDER = Folder


def _features(folder: Path) -> list[str]:
    """The sub-folders with labels."""
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.is_dir() and path.name != "images" and not path.name.startswith(".")
    )


def _files(folder: Path) -> dict[str, Path]:
    """{path in the folder, without its ending: file}."""
    found: dict[str, Path] = {}
    for path in files_in(folder):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise ValueError(
                f"Expected one file named '{name}' in {folder}, whatever its ending. "
                f"Received: {found[name]} and {path}. Rename one, or remove it"
            )
        found[name] = path
    if not found:
        raise ValueError(
            f"Expected image files in {folder}. There are none. A data set of one's "
            "own has images/train and images/test, and the same of each kind of label"
        )
    return found


def _classes(folder: Path) -> list[str]:
    path = folder / "classes.txt"
    remedy = "Write a name a line, that of class 0 first."
    names = [line.strip() for line in read_lines(path, remedy)]
    while names and not names[-1]:
        names.pop()
    if not 2 <= len(set(names) - {""}) == len(names) <= VOID:
        raise ValueError(
            f"Expected from 2 to {VOID} names in {path}, each another one. Received: "
            f"{', '.join(names)}. {remedy}"
        )
    return names


def _described(folder: Path) -> dict[str, tfds.features.Image]:
    """What is in the files, told from the first of each kind."""
    first = next(iter(check_folder(folder)["train"]))
    _, (height, width, *_) = stored_as(_files(folder / "images" / "train")[first])
    described = {"image": tfds.features.Image(shape=(height, width, 3))}
    for feature in _features(folder):
        path = _files(folder / feature / "train")[first]
        dtype, shape = stored_as(path)
        if (folder / feature / "classes.txt").exists():
            described[feature] = tfds.features.LabeledImage(
                labels=_classes(folder / feature),
                shape=(height, width, 1),
                encoding_format="png",
            )
        elif len(shape) == 3 or dtype == np.uint16:
            channels = 3 if len(shape) == 3 else 1
            described[feature] = tfds.features.Image(
                shape=(height, width, channels), dtype=dtype, encoding_format="png"
            )
        else:
            raise ValueError(
                f"Expected {folder / feature / 'classes.txt'}, since {path} has a "
                "number of 8 bits in each pixel. Write a name a line, that of class 0 "
                "first; depth is stored in 16 bits"
            )
    return described


def _read(path: Path, feature: tfds.features.Image, folder: Path) -> np.ndarray:
    """An image or label map as it is stored, (H, W, channels), checked."""
    shape = feature.shape[:2] if feature.shape[2] == 1 else feature.shape
    kind = path.relative_to(folder).parts[0]
    if kind != "images" and is_jpeg(path):
        raise ValueError(
            f"Expected a label map as a PNG. Received: {path}, a JPEG, which changes "
            "the numbers of its pixels. Write it anew, from what it was made of"
        )
    remedy = (
        "Photographs are RGB with 8 bits, as large as the first"
        if kind == "images"
        else "All files are to be as the first of their kind, and as large as the "
        "first image; class numbers and millimetres are stored as grey values"
    )
    stored = read_image(path, feature.np_dtype, shape, remedy)
    if isinstance(feature, tfds.features.LabeledImage):
        highest = stored[stored != VOID].max(initial=0)
        if highest >= len(feature.names):
            classes = folder / kind / "classes.txt"
            raise ValueError(
                f"Expected the classes 0 to {len(feature.names) - 1} in {path}, or "
                f"{VOID} for none. Received: {highest}. Add its name to {classes}, or "
                "write the file anew"
            )
    return stored.reshape(feature.shape)
