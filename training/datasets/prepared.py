"""Prepared data: built once, tied to the files that they were built from."""

import hashlib
import importlib
import json
import shutil
from pathlib import Path

import tensorflow as tf
import tensorflow_datasets as tfds

from training.datasets import proposals
from training.datasets.files import files_in
from training.locks import lock
from training.recipes import RegionData


def prepare(recipe, source, directory):
    """Builds the recipe's data set, once.

    Args:
        recipe: The `Recipe`. Its data set's module has the TFDS builder, `BUILDER`,
            and, if that reads a folder, `check_folder(path)`.
        source: Path of the folder with the original files, or `None` for a data set
            that needs none, or that is prepared.
        directory: Path of all prepared data.

    Returns:
        The TFDS builder, its data prepared.

    Raises:
        ValueError: If the folder is not complete, or not the one that the data were
            prepared from; if the prepared data are of another version, or lost bytes.
    """
    module = importlib.import_module(f"training.datasets.{recipe.data.dataset}")
    builder = _builder(module, recipe, directory)
    folder, stamp = Path(builder.data_path), _stamp(builder)
    reads_files = hasattr(module, "check_folder")
    if reads_files and source is not None:
        module.check_folder(source)
    if not stamp.exists():
        if reads_files and source is None:
            raise ValueError(
                f"The recipe '{recipe.name}' needs the folder with the data set's "
                f"files: give it with --data DIR{_other_versions(folder)}"
            )
        with lock(directory / f".{recipe.data.dataset}.lock", wait=True):
            if not stamp.exists():
                _build(builder, source if reads_files else None, stamp)
        # Another process may have prepared what this builder has not seen.
        builder = _builder(module, recipe, directory)
    before = json.loads(stamp.read_text())
    _check_whole(folder, before.get("sizes", {}))
    if reads_files and source is not None:
        _check_same(folder, before["source"], source)
    if isinstance(recipe.data, RegionData):
        proposals.prepare(builder, (recipe.data.train_split, recipe.data.test_split))
    return builder


def digest(builder):
    """What identifies the prepared examples."""
    return json.loads(_stamp(builder).read_text())["digest"]


def fingerprint(folder):
    """Each file's size and time of change, by its path in the folder."""
    return {
        path.relative_to(folder).as_posix(): [path.stat().st_size, path.stat().st_mtime]
        for path in files_in(folder)
    }


def _stamp(builder):
    return Path(builder.data_path) / "prepared_from.json"


def _builder(module, recipe, directory):
    try:
        return module.BUILDER(config=recipe.data.config, data_dir=str(directory))
    except AssertionError as error:  # TFDS's, for a folder under another version's name
        raise ValueError(
            f"The data set '{recipe.data.dataset}' in {directory} cannot be read: "
            f"{error}. Remove its folder there to prepare the data anew"
        ) from error


def _build(builder, source, stamp):
    # Without the stamp, it is not known what they were made of.
    shutil.rmtree(stamp.parent, ignore_errors=True)
    files = fingerprint(source) if source is not None else {}
    config = tfds.download.DownloadConfig(manual_dir=str(source or ""))
    builder.download_and_prepare(download_config=config)
    content = {
        "digest": _content(stamp.parent),
        "sizes": _sizes(stamp.parent),
        "source": files,
    }
    unfinished = stamp.with_name("unfinished.json")
    unfinished.write_text(json.dumps(content))
    unfinished.replace(stamp)


def _sizes(folder):
    return {path.name: path.stat().st_size for path in folder.glob("*.tfrecord*")}


def _check_whole(folder, sizes):
    """A file that lost its end is only seen when an epoch comes to it."""
    now = _sizes(folder)
    for name, size in sizes.items():
        if now.get(name) != size:
            raise ValueError(
                f"{folder / name} has {now.get(name, 'no')} bytes, not the {size} that "
                f"were prepared. Remove {folder} to prepare the data anew"
            )


def _other_versions(folder):
    versions = {path.name for path in folder.parent.glob("*.*.*")} - {folder.name}
    if not versions:
        return ""
    found = ", ".join(sorted(versions))
    return f". In {folder.parent} is version {found}, and {folder.name} is needed"


def _content(folder):
    total = hashlib.sha256()
    for path in sorted(folder.glob("*.tfrecord*")):
        for record in tf.data.TFRecordDataset(str(path)):
            # Of the record's bytes, the order is by chance: the features are a map.
            features = tf.train.Example.FromString(record.numpy()).features.feature
            for name in sorted(features):
                total.update(name.encode() + features[name].SerializeToString())
    return total.hexdigest()


def _check_same(prepared, before, source):
    now = fingerprint(source)
    changed = [x for x in {**before, **now} if before.get(x) != now.get(x)]
    if changed:
        raise ValueError(
            f"The data in {prepared} were prepared from other files than those in "
            f"{source} now: {len(changed)} differ in name, size or time, the first: "
            f"{changed[0]}. Remove that folder to prepare them anew, leave out --data "
            "to use them as they are, or give another folder with --runs"
        )
