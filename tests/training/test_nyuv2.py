"""Normals against scenes worked out by hand, the builder on a folder of its own."""

import os
import shutil
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
import scipy.io
import tensorflow_datasets as tfds

from training import recipes
from training.datasets import prepared
from training.datasets.nyuv2 import (
    CAMERA,
    CLASSES,
    FRAME,
    Nyuv2,
    check_folder,
    normals_from_depth,
    prepare_from_mat,
    read_example,
)

DATA = Path(os.environ.get("KCS_DATA", Path(__file__).parents[3] / "shared" / "data"))
# (H, W, 3): where the ray of each pixel meets the plane Z = 1.
RAYS = np.dstack(
    [
        *np.meshgrid(
            (np.arange(320) - CAMERA["cx"]) / CAMERA["fx"],
            (np.arange(240) - CAMERA["cy"]) / CAMERA["fy"],
        ),
        np.ones((240, 320)),
    ]
)
FACING = np.array([0.0, 0.0, -1.0])
SLANTED = np.array([0.6, 0.0, -0.8])
FLOOR = np.array([0.0, -0.95, -np.sqrt(1 - 0.95**2)])
OBLIQUE = np.array([-0.36, 0.48, -0.8])


def plane_depth(normal, distance):
    depth = -distance / (RAYS @ normal)
    return np.where((depth > 0) & (depth < 10), depth, 0).astype(np.float32)


def quantised(depth, step=10 / 255):
    return (np.round(depth / step) * step).astype(np.float32)


def degrees_between(normals, expected):
    return np.degrees(np.arccos(np.clip((normals * expected).sum(-1), -1, 1)))


def derive(depth):
    return normals_from_depth(depth, **CAMERA)


@pytest.mark.parametrize("normal", [FACING, SLANTED, FLOOR, OBLIQUE])
def test_normals_of_a_plane_are_exact(normal):
    depth = plane_depth(normal, 2.0)
    normals = derive(depth)
    assert normals.dtype == np.float32
    assert normals.shape == (240, 320, 3)
    assert degrees_between(normals, normal)[depth > 0].max() < 0.1
    lengths = np.linalg.norm(normals, axis=-1)
    np.testing.assert_allclose(lengths, depth > 0, atol=1e-5)


@pytest.mark.parametrize("normal", [FACING, SLANTED, FLOOR, OBLIQUE])
def test_normals_of_a_quantised_plane_show_no_terraces(normal):
    depth = quantised(plane_depth(normal, 2.0))
    error = degrees_between(derive(depth), normal)[depth > 0]
    assert error.mean() < 0.5
    assert np.percentile(error, 99) < 3


@pytest.mark.parametrize(
    ("rounded", "median", "mean"),
    [(lambda depth: depth, 0.5, 1.2), (quantised, 2.5, 3.0)],
    ids=["continuous", "quantised"],
)
def test_normals_of_a_sphere_before_a_wall(rounded, median, mean):
    center, radius = np.array([0.0, 0.0, 2.0]), 0.6
    along, length = RAYS @ center, (RAYS**2).sum(-1)
    discriminant = along**2 - length * (center @ center - radius**2)
    sphere = discriminant > 0
    depth = np.where(
        sphere, (along - np.sqrt(np.maximum(discriminant, 0))) / length, 3.0
    )
    expected = np.where(
        sphere[..., None], (RAYS * depth[..., None] - center) / radius, FACING
    )
    error = degrees_between(derive(rounded(depth)), expected)
    assert np.median(error[sphere]) < median
    assert error[sphere].mean() < mean
    assert error[~sphere].mean() < 0.1


@pytest.mark.parametrize(
    ("rounded", "mean"), [(lambda depth: depth, 0.5), (quantised, 1.5)]
)
def test_normals_do_not_bend_far_around_the_corner_of_two_walls(rounded, mean):
    left, right = np.array([0.7, 0, -0.7]), np.array([-0.7, 0, -0.7])
    left, right = left / np.linalg.norm(left), right / np.linalg.norm(right)
    depths = plane_depth(left, 1.8), plane_depth(right, 1.8)
    on_left = depths[0] < depths[1]
    normals = derive(rounded(np.minimum(*depths)))
    error = degrees_between(normals, np.where(on_left[..., None], left, right))
    assert error.mean() < mean
    edge = np.abs(np.diff(on_left.astype(int), axis=1, append=0)) > 0
    away = cv2.dilate(edge.astype(np.uint8), np.ones((13, 13))) == 0
    assert error[away].mean() < mean / 2


@pytest.mark.parametrize("normal", [FACING, SLANTED])
def test_normals_are_exact_up_to_a_depth_edge(normal):
    depth = plane_depth(FACING, 3.0)
    depth[:, :160] = plane_depth(normal, 1.5)[:, :160]
    expected = np.where(np.arange(320)[:, None] < 160, normal, FACING)
    assert degrees_between(derive(depth), expected).max() < 1


def test_normals_are_zero_where_depth_is_not():
    depth = plane_depth(OBLIQUE, 2.0)
    depth[:20], depth[50:60, 50:60], depth[100, 100] = 0, np.nan, np.inf
    undefined = ~(np.isfinite(depth) & (depth > 0))
    normals = derive(depth)
    assert not normals[undefined].any()
    assert degrees_between(normals, OBLIQUE)[~undefined].max() < 0.1


@pytest.mark.parametrize("depth", [np.zeros((240, 320)), np.full((240, 320), np.nan)])
def test_normals_without_any_depth_are_zero(depth):
    assert not derive(depth).any()


def test_normals_of_a_lone_pixel_are_zero():
    depth = np.zeros((240, 320), np.float32)
    depth[100, 100] = 2.0
    assert not derive(depth).any()


def test_normals_point_to_the_camera():
    # Few pixels of wildly different depth: some planes run behind the camera.
    rng = np.random.default_rng(0)
    depth = np.exp(rng.uniform(-5, 5, (240, 320))) * (rng.random((240, 320)) < 0.4)
    normals = derive(depth)
    assert normals.any()
    assert ((normals * RAYS).sum(-1) < 1e-6).all()


@pytest.mark.skipif(not (DATA / "nyuv2").exists(), reason=f"no nyuv2 in {DATA}")
def test_normals_agree_with_the_true_map():
    example = read_example(DATA / "nyuv2", "0003")
    truth = cv2.imread(str(DATA / "nyuv2" / "true_normals" / "0003.png"))
    normals, valid = decode_normals(decode_png(example["normals"]))
    expected, _ = decode_normals(truth[..., ::-1])
    error = degrees_between(normals, expected)[valid]
    assert valid.mean() > 0.9
    assert error.mean() < 8
    assert np.median(error) < 3.6


def decode_png(encoded):
    image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_UNCHANGED)
    return image[..., ::-1] if image.ndim == 3 else image


def decode_normals(image):
    valid = image.any(-1)
    normals = image / 127.5 - 1
    return normals / np.linalg.norm(normals, axis=-1, keepdims=True), valid


LABELS = np.broadcast_to(np.arange(320) // 8 + 1, (240, 320)).astype(np.uint8).copy()
LABELS[:FRAME] = 0


@pytest.fixture
def folder(tmp_path):
    """Six images of one oblique plane with every class as a stripe, 4 to train."""
    path = tmp_path / "nyuv2"
    for name in ("rgb", "labels40", "depth"):
        (path / name).mkdir(parents=True)
    millimetres = np.round(plane_depth(OBLIQUE, 2.0) * 1000).astype(np.uint16)
    for index in range(1, 7):
        rgb = np.full((240, 320, 3), 40 * index, np.uint8)
        cv2.imwrite(str(path / f"rgb/{index:04d}.jpg"), rgb)
        cv2.imwrite(str(path / f"labels40/{index:04d}.png"), LABELS)
        cv2.imwrite(str(path / f"depth/{index:04d}.png"), millimetres)
    write_splits(path / "splits.mat", train=[1, 3, 4, 6], test=[2, 5])
    (path / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return path


def write_splits(path, train, test):
    columns = {"trainNdxs": np.array([train]).T, "testNdxs": np.array([test]).T}
    scipy.io.savemat(path, {key: value.astype(float) for key, value in columns.items()})


def build(folder, config="full"):
    builder = Nyuv2(data_dir=folder.parent / "tfds", config=config)
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=folder)
    )
    return builder


def test_builder_reads_back_what_the_folder_holds(folder):
    builder = build(folder)
    splits = {
        split: sorted(tfds.as_numpy(dataset), key=lambda example: example["id"])
        for split, dataset in builder.as_dataset().items()
    }
    ids = {split: [e["id"].decode() for e in splits[split]] for split in splits}
    assert ids == {"train": ["0001", "0003", "0004", "0006"], "test": ["0002", "0005"]}
    assert builder.info.features["segmentation"].names == list(CLASSES)

    example = splits["test"][1]
    assert np.abs(example["image"].astype(int) - 200).max() <= 1
    segmentation = example["segmentation"][..., 0]
    assert (segmentation[:FRAME] == 255).all()
    np.testing.assert_array_equal(segmentation[FRAME:], LABELS[FRAME:] - 1)

    normals, valid = decode_normals(example["normals"])
    assert valid[FRAME:-FRAME, FRAME:-FRAME].all()
    assert valid.sum() == (240 - 2 * FRAME) * (320 - 2 * FRAME)
    assert degrees_between(normals, OBLIQUE)[valid].max() < 1


def test_builder_keeps_the_bytes_of_the_jpeg(folder):
    dataset = build(folder).as_dataset(
        split="test", decoders={"image": tfds.decode.SkipDecoding()}
    )
    for example in tfds.as_numpy(dataset):
        file = folder / f"rgb/{example['id'].decode()}.jpg"
        assert example["image"] == file.read_bytes()


def test_toy_takes_the_first_of_each_split(folder):
    for index in range(7, 31):
        for name, suffix in (("rgb", "jpg"), ("labels40", "png"), ("depth", "png")):
            shutil.copy(
                folder / f"{name}/0001.{suffix}",
                folder / f"{name}/{index:04d}.{suffix}",
            )
    write_splits(folder / "splits.mat", train=range(20, 0, -1), test=range(21, 31))
    datasets = build(folder, "toy").as_dataset()
    ids = {
        split: {int(example["id"]) for example in tfds.as_numpy(dataset)}
        for split, dataset in datasets.items()
    }
    assert ids == {"train": set(range(13, 21)), "test": set(range(21, 25))}


def test_check_folder_returns_the_ids_of_each_split(folder):
    train, test = ["0001", "0003", "0004", "0006"], ["0002", "0005"]
    assert check_folder(folder) == {"train": train, "test": test}


def test_check_folder_names_a_missing_folder(tmp_path):
    with pytest.raises(ValueError, match=r"Expected .* Missing: .*nowhere\. Write it"):
        check_folder(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["splits.mat", "classes.txt", "depth"])
def test_check_folder_names_a_missing_part(folder, name):
    (folder / name).rename(folder / "gone")
    with pytest.raises(ValueError, match=rf"Missing: .*nyuv2/{name}\. Write it"):
        check_folder(folder)


@pytest.mark.parametrize(
    "name", ["rgb/0002.jpg", "labels40/0002.png", "depth/0002.png"]
)
def test_check_folder_names_the_first_missing_image(folder, name):
    (folder / name).unlink()
    (folder / name.replace("0002", "0005")).unlink()
    with pytest.raises(ValueError, match=f"Missing 2, the first: .*nyuv2/{name}"):
        check_folder(folder)


def test_check_folder_refuses_images_of_no_split(folder):
    shutil.copy(folder / "depth/0001.png", folder / "depth/0007.png")
    with pytest.raises(ValueError, match=r"Expected 6 files in .*depth.* Found 7"):
        check_folder(folder)


def test_check_folder_refuses_an_image_in_both_splits(folder):
    write_splits(folder / "splits.mat", train=[1, 2, 3, 4, 6], test=[2, 5])
    with pytest.raises(ValueError, match=r"Expected 7 files in .*rgb.* Found 6"):
        check_folder(folder)


def test_check_folder_refuses_other_classes(folder):
    (folder / "classes.txt").write_text("\n".join(["wall", "lava", *CLASSES[2:]]))
    with pytest.raises(ValueError, match=r"differing in: \['floor', 'lava'\]"):
        check_folder(folder)


def test_check_folder_refuses_classes_in_another_order(folder):
    (folder / "classes.txt").write_text("\n".join(CLASSES[::-1]))
    with pytest.raises(ValueError, match="differing in: their order"):
        check_folder(folder)


def test_check_folder_refuses_a_splits_file_without_the_splits(folder):
    scipy.io.savemat(folder / "splits.mat", {"trainNdxs": [[1.0]]})
    with pytest.raises(ValueError, match=r"KeyError: 'testNdxs'\. Use the official"):
        check_folder(folder)


def test_splits_of_matlab_7_3_are_read(folder):
    with h5py.File(folder / "splits.mat", "w") as file:
        file["trainNdxs"] = np.array([[1.0, 3, 4, 6]])  # as MATLAB stores a column
        file["testNdxs"] = np.array([[2.0, 5]])
    train, test = ["0001", "0003", "0004", "0006"], ["0002", "0005"]
    assert check_folder(folder) == {"train": train, "test": test}


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "The file is empty"),
        (b"\0" * 200, "Error"),
        (b"MATLAB 5.0 MAT-file" + 200 * b"garbage", "Error"),
        (b"\x89HDF\r\n\x1a\n" + b"garbage" * 99, "OSError"),
    ],
)
def test_damaged_splits_are_refused(folder, content, found):
    (folder / "splits.mat").write_bytes(content)
    message = rf"a MATLAB file with .*nyuv2/splits\.mat\. .*{found}.*Use the official"
    with pytest.raises(ValueError, match=message):
        check_folder(folder)


def test_splits_without_an_image_are_refused(folder):
    write_splits(folder / "splits.mat", train=[1, 3], test=[])
    with pytest.raises(ValueError, match=r"Expected indices.* none\. Use the official"):
        check_folder(folder)


def test_what_file_managers_leave_does_not_count(folder):
    before = prepared.fingerprint(folder)
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._0001.jpg"):
        for place in ("", "rgb", "depth", ".hidden"):
            (folder / place).mkdir(exist_ok=True)
            (folder / place / name).write_bytes(b"left")
    assert check_folder(folder)["test"] == ["0002", "0005"]
    assert prepared.fingerprint(folder) == before


def test_classes_with_a_byte_order_mark_are_read(folder):
    (folder / "classes.txt").write_text("\r\n".join(CLASSES), "utf-8-sig")
    assert check_folder(folder)["test"] == ["0002", "0005"]
    (folder / "classes.txt").write_bytes(b"\xe9t\xe9")
    with pytest.raises(ValueError, match=r"text in UTF-8 in .*classes\.txt\. Unicode"):
        check_folder(folder)


def test_builder_checks_the_folder_before_it_generates(folder):
    (folder / "rgb/0002.jpg").unlink()
    with pytest.raises(ValueError, match=r"Missing 1, the first: .*0002\.jpg"):
        build(folder)


def test_a_label_out_of_range_names_its_file(folder):
    cv2.imwrite(str(folder / "labels40/0003.png"), np.full((240, 320), 41, np.uint8))
    with pytest.raises(ValueError, match=r"0\.\.40 in .*0003\.png\. Received: 41"):
        build(folder)


@pytest.mark.parametrize(
    "name", ["rgb/0002.jpg", "labels40/0002.png", "depth/0002.png"]
)
def test_an_image_of_another_size_names_its_file(folder, name):
    cv2.imwrite(str(folder / name), np.zeros((48, 64, 3), np.uint8))
    with pytest.raises(ValueError, match=rf"in .*{name}\. Received: uint8 \(48, 64, 3"):
        read_example(folder, "0002")


def test_an_unreadable_image_names_its_file(folder):
    (folder / "depth/0002.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"in .*depth/0002\.png\. Received: no image"):
        read_example(folder, "0002")


@pytest.mark.parametrize(
    "name", ["rgb/0002.jpg", "labels40/0002.png", "depth/0002.png"]
)
@pytest.mark.parametrize("share", [0.5, 0.98])
def test_a_truncated_image_names_its_file(folder, name, share):
    """OpenCV mends such files, at times; TensorFlow, which trains, does not."""
    rng = np.random.default_rng(0)
    if name.startswith("rgb"):
        cv2.imwrite(str(folder / name), rng.integers(0, 255, (240, 320, 3), np.uint8))
    encoded = (folder / name).read_bytes()
    (folder / name).write_bytes(encoded[: int(share * len(encoded))])
    with pytest.raises(ValueError, match=rf"in .*{name}[,.] .*Write the file anew"):
        read_example(folder, "0002")


def prepare_recipe(source, directory):
    return prepared.prepare(recipes.find("nyuv2"), source, directory / "datasets")


def digest(builder):
    return prepared.digest(builder, ["image", "normals", "segmentation"])


def test_prepared_data_are_used_again_for_the_same_folder_or_none(folder, tmp_path):
    first = prepare_recipe(folder, tmp_path)
    files = list(Path(first.data_path).iterdir())
    before = [path.stat().st_mtime_ns for path in files]

    assert digest(prepare_recipe(folder, tmp_path)) == digest(first)
    assert digest(prepare_recipe(None, tmp_path)) == digest(first)
    assert [path.stat().st_mtime_ns for path in files] == before


def test_data_prepared_from_other_files_are_refused(folder, tmp_path):
    before = digest(prepare_recipe(folder, tmp_path))
    with pytest.raises(ValueError, match=r"Missing: .*nowhere"):
        prepare_recipe(tmp_path / "nowhere", tmp_path)
    rgb = np.full((240, 320, 3), 7, np.uint8)
    cv2.imwrite(str(folder / "rgb/0002.jpg"), rgb)
    with pytest.raises(ValueError, match=r"1 differ in name, .* first: rgb/0002\.jpg"):
        prepare_recipe(folder, tmp_path)
    shutil.rmtree(tmp_path / "datasets")
    assert digest(prepare_recipe(folder, tmp_path)) != before


def test_files_are_the_same_by_their_names_sizes_and_times(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text("whole")
        os.utime(tmp_path / name, (0, 1000))
    before = prepared.fingerprint(tmp_path)
    prepared._check_same(tmp_path, before, tmp_path)

    def shorten():
        (tmp_path / "a").write_text("part")
        os.utime(tmp_path / "a", (0, 1000))

    for change, count in (
        (shorten, 1),
        (lambda: os.utime(tmp_path / "b", (0, 1001)), 2),
        ((tmp_path / "c").touch, 3),
        ((tmp_path / "a").unlink, 3),
    ):
        change()
        with pytest.raises(ValueError, match=rf" now: {count} differ in name, size or"):
            prepared._check_same(tmp_path, before, tmp_path)


def test_data_whose_preparation_was_stopped_are_prepared_anew(folder, tmp_path):
    builder = prepare_recipe(folder, tmp_path)
    (builder.data_path / "prepared_from.json").unlink()
    with pytest.raises(ValueError, match="give it with --data DIR"):
        prepare_recipe(None, tmp_path)
    assert builder.data_path.exists()
    assert len(prepare_recipe(folder, tmp_path).as_dataset(split="train")) == 4


def test_data_of_another_version_are_named(folder, tmp_path):
    path = Path(prepare_recipe(folder, tmp_path).data_path)
    path.rename(path.with_name("0.9.0"))
    with pytest.raises(
        ValueError, match=r"is version 0\.9\.0, and \d\.\d\.\d is needed"
    ):
        prepare_recipe(None, tmp_path)
    assert path.with_name("0.9.0").exists()


def test_nyuv2_needs_a_folder(tmp_path):
    with pytest.raises(ValueError, match=r"'nyuv2' needs .* with --data DIR"):
        prepare_recipe(None, tmp_path)


@pytest.fixture
def release(tmp_path):
    """Three images in the official layout, returned at half its resolution."""
    rng = np.random.default_rng(1)
    halved = {
        "images": np.full((3, 3, 320, 240), np.arange(240) // 2 + 60, np.uint8),
        "depths": rng.uniform(0.7, 9.9, (3, 320, 240)).astype(np.float32),
        "labels": rng.integers(0, 895, (3, 320, 240), np.uint16),
    }
    halved["images"][1, 0] = 200  # one image is redder
    full = {name: array.repeat(2, -1).repeat(2, -2) for name, array in halved.items()}
    # Of labels and depth every other pixel is taken, and no mean.
    for name, other in (("depths", 3.0), ("labels", 894)):
        full[name][:, 1::2] = full[name][..., 1::2] = other
    # Stripes that only averaging removes.
    full["images"][..., ::2] += 20
    full["images"][..., 1::2] -= 20
    with h5py.File(tmp_path / "nyu.mat", "w") as file:
        for name, array in full.items():
            file[name] = array
    write_splits(tmp_path / "splits.mat", train=[2, 3], test=[1])
    to_40 = np.arange(894) % 40 + 1
    scipy.io.savemat(tmp_path / "mapping.mat", {"mapClass": to_40[None].astype(float)})
    return halved


def prepare(tmp_path):
    names = "nyu.mat", "splits.mat", "mapping.mat", "out/nyuv2"
    prepare_from_mat(*(tmp_path / name for name in names))


def test_prepare_writes_the_folder_that_the_builder_reads(tmp_path, release):
    prepare(tmp_path)
    out = tmp_path / "out" / "nyuv2"
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["nyuv2"]
    assert check_folder(out) == {"train": ["0002", "0003"], "test": ["0001"]}
    for index in range(3):
        name = f"{index + 1:04d}"
        labels = cv2.imread(str(out / f"labels40/{name}.png"), cv2.IMREAD_UNCHANGED)
        source = release["labels"][index].T.astype(int)
        np.testing.assert_array_equal(
            labels, np.where(source, (source - 1) % 40 + 1, 0)
        )
        depth = cv2.imread(str(out / f"depth/{name}.png"), cv2.IMREAD_UNCHANGED)
        assert np.abs(depth - release["depths"][index].T * 1000).max() < 0.51
        image = cv2.imread(str(out / f"rgb/{name}.jpg"))[..., ::-1]
        expected = release["images"][index].transpose(2, 1, 0)
        assert np.abs(image.astype(int) - expected).mean() < 2


def test_prepare_refuses_a_folder_with_content(tmp_path, release):
    (tmp_path / "out/nyuv2").mkdir(parents=True)
    (tmp_path / "out/nyuv2/mine").touch()
    with pytest.raises(ValueError, match=r"new or empty folder.*has content\. Remove"):
        prepare(tmp_path)


def test_prepare_accepts_an_empty_folder(tmp_path, release):
    (tmp_path / "out/nyuv2").mkdir(parents=True)
    prepare(tmp_path)
    assert len(check_folder(tmp_path / "out/nyuv2")["train"]) == 2


def test_prepare_leaves_nothing_behind_when_it_fails(tmp_path, release):
    with h5py.File(tmp_path / "nyu.mat", "a") as file:
        file["labels"][2, 0, 0] = 2000
    with pytest.raises(ValueError, match=r"whole image 3 in .*nyu\.mat\. IndexError"):
        prepare(tmp_path)
    assert not any((tmp_path / "out").iterdir())


def test_prepare_refuses_a_mat_that_is_not_hdf5(tmp_path, release):
    (tmp_path / "nyu.mat").write_text("MATLAB 5.0")
    with pytest.raises(ValueError, match=r"an HDF5 file, in .*nyu\.mat\. "):
        prepare(tmp_path)


def test_prepare_refuses_a_mat_without_depths(tmp_path, release):
    with h5py.File(tmp_path / "nyu.mat", "a") as file:
        del file["depths"]
    with pytest.raises(ValueError, match=r"to hold images.*Received: {'images': \(3"):
        prepare(tmp_path)


def test_prepare_refuses_splits_of_other_images(tmp_path, release):
    write_splits(tmp_path / "splits.mat", train=[2, 3], test=[1, 4])
    with pytest.raises(ValueError, match=r"Received 4 indices up to 4\. Use the"):
        prepare(tmp_path)


def test_prepare_refuses_another_mapping(tmp_path, release):
    thirteen = np.arange(894) % 13 + 1
    scipy.io.savemat(tmp_path / "mapping.mat", {"mapClass": thirteen[None]})
    with pytest.raises(ValueError, match=r"Received 894 values up to 13\. Use class"):
        prepare(tmp_path)
