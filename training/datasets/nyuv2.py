"""NYUv2's labelled images as a TFDS data set, with normals derived from their depth.

The builder reads a plain folder; `prepare_from_mat` writes that folder from the
official release. Nothing is downloaded here.
"""

import dataclasses
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import cv2
import h5py
import numpy as np
import scipy.io
import tensorflow_datasets as tfds
from rich.progress import track

from training.datasets.files import check_names, files_in, new_folder, read_as
from training.datasets.images import encode_normals, encode_png, read_image

# Spelled as the official files spell them; the index here is the class minus one.
CLASSES = (
    *("wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door"),
    *("window", "bookshelf", "picture", "counter", "blinds", "desk", "shelves"),
    *("curtain", "dresser", "pillow", "mirror", "floor mat", "clothes", "ceiling"),
    *("books", "refridgerator", "television", "paper", "towel", "shower curtain"),
    *("box", "whiteboard", "person", "night stand", "toilet", "sink", "lamp"),
    *("bathtub", "bag", "otherstructure", "otherfurniture", "otherprop"),
)
HEIGHT, WIDTH = 240, 320
# The official camera is given for 640x480.
CAMERA = {
    "fx": 518.8579 / 2,
    "fy": 519.4696 / 2,
    "cx": 325.5824 / 2,
    "cy": 253.7362 / 2,
}
FRAME = 4  # pixels of white frame on each side at 320x240, measured on the images
SUFFIXES = {"rgb": ".jpg", "labels40": ".png", "depth": ".png"}


def normals_from_depth(
    depth: np.ndarray, *, fx: float, fy: float, cx: float, cy: float
) -> np.ndarray:
    """Derives surface normals from a depth map, quantised or not.

    A plane is linear in inverse depth, `1 / Z = a x + b y + c` with
    `x = (u - cx) / fx` and `y = (v - cy) / fy`, and `(a, b, c)` is its normal up to
    scale. Planes are fitted in windows from wide to narrow. After each fit a
    pixel's depth moves to its plane, but no further than half a quantisation step
    from the depth given: so the terraces of quantised depth are smoothed away,
    while continuous depth, whose step is nearly 0, stays as it is.

    Args:
        depth: `(H, W)` array, metres along the optical axis. A pixel of 0, NaN or
            infinity has no depth.
        fx, fy: Focal lengths, pixels of this array.
        cx, cy: Principal point, pixels of this array.

    Returns:
        `(H, W, 3)` float32 array of unit normals in camera coordinates, x right,
        y down, z away from the camera, each pointing to the camera's side of its
        surface; zero where there is no depth, or too little around to fit a plane.

    Example:

    >>> wall = np.full((48, 64), 2.0)
    >>> normals = normals_from_depth(wall, fx=50, fy=50, cx=32, cy=24)
    >>> round(float(normals[24, 32, 2]), 3)
    -1.0
    """
    valid = np.isfinite(depth) & (depth > 0)
    x, y = np.meshgrid(
        (np.arange(depth.shape[1]) - cx) / fx, (np.arange(depth.shape[0]) - cy) / fy
    )
    z = np.where(valid, depth, 1.0).astype(np.float64)
    step = quantisation_step(depth[valid])
    nearest, farthest = 1 / np.maximum(z - step / 2, z / 2), 1 / (z + step / 2)
    # 5 mm is what a surface may bend within a window; chosen, as the radii are, for
    # the smallest error on the one true normal map at hand.
    tolerance = 0.005 + step / 5
    inverse_depth = 1 / z
    for radius in (20, 10, 5, 3):
        planes = fit_planes(inverse_depth, valid, x, y, radius, tolerance)
        fitted = planes[..., 0] * x + planes[..., 1] * y + planes[..., 2]
        inverse_depth = np.clip(fitted, farthest, nearest)
    length = np.linalg.norm(planes, axis=-1)
    # The normal points against the ray (x, y, 1), on which the fit is 1 / Z > 0.
    scale = -np.sign(fitted) * valid / np.where(length > 0, length, 1.0)
    return (planes * scale[..., None]).astype(np.float32)


def quantisation_step(depths: np.ndarray) -> float:
    """Returns the usual gap between neighbouring values, 0 where there is only one."""
    gaps = np.diff(np.unique(depths))
    # A scene of few distinct depths has gaps that are no steps: no sensor is as
    # coarse as 0.1 m.
    return min(float(np.median(gaps)), 0.1) if gaps.size else 0.0


def fit_planes(
    inverse_depth: np.ndarray,
    valid: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    radius: int,
    tolerance: float,
) -> np.ndarray:
    """Returns the plane `(a, b, c)` of each pixel, `(H, W, 3)`, 0 where there is none.

    Each window's plane is a least-squares fit. All windows that cover a pixel vote,
    and those that fit within `tolerance` metres win: a window across a depth edge
    fits badly, so pixels at an edge follow the windows on their own side.
    """

    def mean(*channels: np.ndarray) -> np.ndarray:
        size = (2 * radius + 1, 2 * radius + 1)
        stack = cv2.boxFilter(np.dstack(channels), cv2.CV_64F, size, borderType=0)
        return np.moveaxis(stack, -1, 0)

    w = inverse_depth
    moments = np.stack([x, y, w, x * x, y * y, w * w, x * y, x * w, y * w]) * valid
    filled, *sums = mean(valid.astype(np.float64), *moments)
    # A third of a window cannot lie on one line, so its plane is determined.
    enough = filled > 1 / 3
    mx, my, mw, xx, yy, ww, xy, xw, yw = sums / np.where(enough, filled, 1.0)
    xx, yy, ww = xx - mx * mx, yy - my * my, ww - mw * mw
    xy, xw, yw = xy - mx * my, xw - mx * mw, yw - my * mw
    determinant = np.where(enough, xx * yy - xy * xy, np.inf)
    a = (xw * yy - yw * xy) / determinant
    b = (yw * xx - xw * xy) / determinant
    c = mw - a * mx - b * my
    # dZ = Z^2 dw turns the squared residual into square metres.
    residual = np.maximum(ww - a * xw - b * yw, 0) / np.where(enough, mw, 1.0) ** 4
    # The small constant lets all windows vote where none fits.
    vote = enough * (np.exp(-residual / tolerance**2) + 1e-6)
    *planes, votes = mean(a * vote, b * vote, c * vote, vote)
    return np.dstack(planes) / np.maximum(votes, 1e-12)[..., None]


def check_folder(path: str | os.PathLike) -> dict[str, list[str]]:
    """Checks that a folder holds a complete NYUv2, without opening its images.

    Args:
        path: The folder with `rgb`, `labels40`, `depth`, `splits.mat` and
            `classes.txt`.

    Returns:
        The image ids of each split, e.g. `{"train": ["0003", ...], "test": [...]}`.

    Raises:
        ValueError: If something is missing, superfluous or of another class list.
    """
    folder = Path(path)
    remedy = "Write it with `python -m training prepare nyuv2`."
    for name in ("", *SUFFIXES, "splits.mat", "classes.txt"):
        if not (folder / name).exists():
            raise ValueError(
                f"Expected the NYUv2 folder {folder} with {', '.join(SUFFIXES)}, "
                f"splits.mat and classes.txt. Missing: {folder / name}. {remedy}"
            )
    check_names(folder / "classes.txt", CLASSES, "NYUv2 classes", remedy)
    splits = read_splits(folder / "splits.mat")
    ids = [image_id for split in splits.values() for image_id in split]
    for name, suffix in SUFFIXES.items():
        found = {file.name for file in files_in(folder / name)}
        expected = [image_id + suffix for image_id in sorted(ids)]
        missing = [file for file in expected if file not in found]
        if missing:
            raise ValueError(
                f"Expected {len(ids)} files in {folder / name}, one for each index in "
                f"splits.mat. Missing {len(missing)}, the first: "
                f"{folder / name / missing[0]}. {remedy}"
            )
        if len(found) != len(ids):
            raise ValueError(
                f"Expected {len(ids)} files in {folder / name}, one for each index in "
                f"splits.mat. Found {len(found)}, of others "
                f"{min(found - set(expected), default='none')}. Remove the others, or "
                f"use the splits.mat that belongs to them."
            )
    return splits


def read_splits(path: str | os.PathLike) -> dict[str, list[str]]:
    """Reads the official split: image ids, "0001" being the first image's."""
    indices = _read_mat(path, ("trainNdxs", "testNdxs"), "splits.mat")
    if not all(of_split.size for of_split in indices):
        raise ValueError(
            f"Expected indices of images in trainNdxs and testNdxs of {path}. Received "
            "none. Use the official splits.mat."
        )
    return {
        split: [f"{int(index):04d}" for index in of_split.ravel()]
        for split, of_split in zip(("train", "test"), indices, strict=True)
    }


def _read_mat(
    path: str | os.PathLike, names: tuple[str, ...], official: str
) -> list[np.ndarray]:
    """The numbers of those names in a MATLAB file, of version 7.3 or older."""
    remedy = f"Use the official {official}."
    with read_as(f"a MATLAB file with {' and '.join(names)}", path, remedy):
        if h5py.is_hdf5(path):
            with h5py.File(path) as file:
                return [np.asarray(file[name], np.float64) for name in names]
        values = scipy.io.loadmat(path)
        return [np.asarray(values[name], np.float64) for name in names]


@dataclasses.dataclass(eq=False)
class Nyuv2Config(tfds.core.BuilderConfig):
    """How many images to take of each split, from its start."""

    train: int = 795
    test: int = 654


class Nyuv2(tfds.core.GeneratorBasedBuilder):
    """NYUv2's 1449 labelled images at 320x240: 40 classes, surface normals and depth.

    Each example is `{"image", "segmentation", "normals", "depth", "id"}`. Segmentation
    holds the class index 0..39, 255 where unlabelled. Normals hold
    `round((n + 1) / 2 * 255)` with n as `normals_from_depth` returns it, and
    (0, 0, 0), which no unit vector encodes to, where undefined. Depth is in millimetres
    along the camera's axis, 0 where there is none.
    """

    VERSION = tfds.core.Version("1.1.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.1.0": "`depth` is new."}
    BUILDER_CONFIGS: ClassVar[list[tfds.core.BuilderConfig]] = [
        Nyuv2Config(name="full", description="All images."),
        Nyuv2Config(name="toy", description="For tests.", train=8, test=4),
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "NYUv2 is for research use and must be fetched by hand: get "
        "nyu_depth_v2_labeled.mat and splits.mat from "
        "https://cs.nyu.edu/~fergus/datasets/nyu_depth_v2.html and classMapping40.mat "
        "by Gupta et al., turn them into a folder with `python -m training prepare "
        "nyuv2`, and give that folder as manual_dir. It holds rgb/NNNN.jpg, "
        "labels40/NNNN.png (class 1..40, 0 unlabelled), depth/NNNN.png (millimetres), "
        "splits.mat and classes.txt."
    )

    def _info(self) -> tfds.core.DatasetInfo:
        shape = (HEIGHT, WIDTH, 3)
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=shape, encoding_format="jpeg"),
                    "segmentation": tfds.features.LabeledImage(
                        labels=list(CLASSES),
                        shape=(HEIGHT, WIDTH, 1),
                        encoding_format="png",
                    ),
                    "normals": tfds.features.Image(shape=shape, encoding_format="png"),
                    "depth": tfds.features.Image(
                        shape=(HEIGHT, WIDTH, 1),
                        dtype=np.uint16,
                        encoding_format="png",
                    ),
                    "id": tfds.features.Text(),
                }
            ),
            homepage="https://cs.nyu.edu/~fergus/datasets/nyu_depth_v2.html",
            citation="""@inproceedings{silberman2012indoor,
  title={Indoor Segmentation and Support Inference from {RGBD} Images},
  author={Silberman, Nathan and Hoiem, Derek and Kohli, Pushmeet and Fergus, Rob},
  booktitle={European Conference on Computer Vision},
  year={2012}
}""",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        folder = Path(dl_manager.manual_dir)
        splits = check_folder(folder)
        return {
            split: self._generate_examples(
                folder, splits[split][: getattr(self.builder_config, split)]
            )
            for split in ("train", "test")
        }

    def _generate_examples(self, folder: Path, ids: list[str]) -> Iterator[tuple]:
        # Threads are enough for all cores: OpenCV and NumPy release the GIL.
        with ThreadPoolExecutor(os.cpu_count()) as executor:
            examples = executor.map(
                lambda image_id: read_example(folder, image_id), ids
            )
            yield from zip(ids, examples, strict=True)


BUILDER = Nyuv2


def read_example(folder: Path, image_id: str) -> dict[str, Any]:
    """Reads one image of the folder as an example of `Nyuv2`, its images encoded."""
    rgb = folder / "rgb" / f"{image_id}.jpg"
    read_image(rgb, np.uint8, (HEIGHT, WIDTH, 3))
    maps = read_maps(folder, image_id, (HEIGHT, WIDTH))
    maps["normals"] = maps["normals"][..., ::-1]  # OpenCV writes BGR
    encoded = {name: encode_png(array) for name, array in maps.items()}
    return {"image": rgb.read_bytes(), **encoded, "id": image_id}


def read_maps(
    folder: Path, image_id: str, shape: tuple[int, int]
) -> dict[str, np.ndarray]:
    """The labels of an image as `Nyuv2` stores them, (H, W, channels).

    Args:
        folder: The NYUv2 folder.
        image_id: Such as "0001".
        shape: `(H, W)` of its files, 240x320 or a multiple.
    """
    labels, depth = (folder / x / f"{image_id}.png" for x in ("labels40", "depth"))
    segmentation = read_image(labels, np.uint8, shape)
    if segmentation.max() > len(CLASSES):
        raise ValueError(
            f"Expected the classes 0..{len(CLASSES)} in {labels}. "
            f"Received: {segmentation.max()}. Write the file anew."
        )
    scale = shape[0] // HEIGHT
    millimetres = np.zeros(shape, np.uint16)
    inside = (slice(FRAME * scale, -FRAME * scale),) * 2
    millimetres[inside] = read_image(depth, np.uint16, shape)[inside]
    metres = millimetres.astype(np.float32) / 1000
    camera = {name: scale * value for name, value in CAMERA.items()}
    return {
        # uint8 wraps the unlabelled 0 round to 255, which is no label.
        "segmentation": (segmentation - np.uint8(1))[..., None],
        "normals": encode_normals(normals_from_depth(metres, **camera)),
        "depth": millimetres[..., None],
    }


def prepare_from_mat(
    mat: str | os.PathLike,
    splits: str | os.PathLike,
    mapping: str | os.PathLike,
    directory: str | os.PathLike,
    full_size: bool = False,
) -> None:
    """Writes the folder that `Nyuv2` reads from the files of the official release.

    The folder appears when it is complete, and not before.

    Args:
        mat: `nyu_depth_v2_labeled.mat`.
        splits: The official `splits.mat`.
        mapping: `classMapping40.mat` by Gupta et al., from 894 classes to 40.
        directory: The folder to write; must not exist, or be empty.
        full_size: Whether its files are 640x480, which `evaluate --full-resolution`
            reads, and not 320x240.

    Raises:
        ValueError: If a file is not what it should be, or the folder has content.
    """
    with new_folder(Path(directory)) as folder:
        to_40_classes = read_mapping(mapping)
        size = (2 * WIDTH, 2 * HEIGHT) if full_size else (WIDTH, HEIGHT)
        indices = sorted(int(i) for ids in read_splits(splits).values() for i in ids)
        with open_mat(mat) as release:
            if indices != list(range(1, len(release["images"]) + 1)):
                raise ValueError(
                    f"Expected {splits} to name each of the {len(release['images'])} "
                    f"images of {mat} once. Received {len(indices)} indices up to "
                    f"{indices[-1]}. Use the files of one release."
                )
            for name in SUFFIXES:
                (folder / name).mkdir()
            (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n", "utf-8")
            shutil.copyfile(splits, folder / "splits.mat")
            for index in track(indices, "Writing NYUv2"):
                with read_as(f"a whole image {index}", mat, "Download it anew."):
                    image = release["images"][index - 1].T[..., ::-1]  # (H, W, C), BGR
                    depth = np.nan_to_num(release["depths"][index - 1].T)
                    labels = to_40_classes[release["labels"][index - 1].T]
                millimetres = np.round(depth * 1000).clip(0, 65535).astype(np.uint16)
                # Nearest takes every other pixel, which halving the camera fits.
                for path, array, interpolation in (
                    (f"rgb/{index:04d}.jpg", image, cv2.INTER_AREA),
                    (f"labels40/{index:04d}.png", labels, cv2.INTER_NEAREST),
                    (f"depth/{index:04d}.png", millimetres, cv2.INTER_NEAREST),
                ):
                    write_image(folder / path, array, size, interpolation)
            check_folder(folder)


def open_mat(path: str | os.PathLike) -> h5py.File:
    """Opens the official images, depths and labels: arrays (N, [3,] 640, 480)."""
    with read_as("nyu_depth_v2_labeled.mat, an HDF5 file,", path, "Download it anew."):
        file = h5py.File(path)
        shapes = {
            name: file[name].shape
            for name in ("images", "depths", "labels")
            if name in file
        }
    count = shapes.get("images", (0,))[0]
    size = (640, 480)
    expected = {
        "images": (count, 3, *size),
        "depths": (count, *size),
        "labels": (count, *size),
    }
    if shapes != expected:
        file.close()
        raise ValueError(
            f"Expected {path} to hold images (N, 3, 640, 480), depths and labels "
            f"(N, 640, 480). Received: {shapes}. Use nyu_depth_v2_labeled.mat."
        )
    return file


def read_mapping(path: str | os.PathLike) -> np.ndarray:
    """Reads the class 1..40 of each of the classes 0..894; 0 stays unlabelled."""
    (classes,) = _read_mat(path, ("mapClass",), "classMapping40.mat")
    classes = classes.ravel()
    if classes.size != 894 or classes.min() < 1 or classes.max() != len(CLASSES):
        raise ValueError(
            f"Expected {path} to map 894 classes to 1..{len(CLASSES)} in mapClass. "
            f"Received {classes.size} values up to {classes.max(initial=0):g}. Use "
            f"classMapping40.mat."
        )
    return np.concatenate([[0], classes]).astype(np.uint8)


def write_image(
    path: Path, image: np.ndarray, size: tuple[int, int], interpolation: int
) -> None:
    resized = cv2.resize(image, size, interpolation=interpolation)
    if not cv2.imwrite(os.fspath(path), resized):
        raise OSError(f"Could not write {path}. Is the disk full?")
