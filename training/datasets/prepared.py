"""Prepared data: built once, tied to the files that they were built from."""

import hashlib
import importlib
import json
import shutil
from pathlib import Path

import tensorflow_datasets as tfds

from training.datasets import proposals
from training.recipe import RegionData


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
            prepared from.
    """
    module = importlib.import_module(f"training.datasets.{recipe.data.dataset}")
    builder = module.BUILDER(config=recipe.data.config, data_dir=str(directory))
    folder, stamp = Path(builder.data_path), _stamp(builder)
    reads_files = hasattr(module, "check_folder")
    if reads_files and source is not None:
        module.check_folder(source)
    if not stamp.exists():
        if reads_files and source is None:
            raise ValueError(
                f"The recipe '{recipe.name}' needs the folder with the data set's "
                "files: give it with --data DIR"
            )
        # Without the stamp, it is not known what they were made of.
        shutil.rmtree(folder, ignore_errors=True)
        files = fingerprint(source) if reads_files else {}
        config = tfds.download.DownloadConfig(manual_dir=str(source or ""))
        builder.download_and_prepare(download_config=config)
        content = {"digest": _content(folder), "source": files}
        unfinished = stamp.with_name("unfinished.json")
        unfinished.write_text(json.dumps(content))
        unfinished.replace(stamp)
    elif reads_files and source is not None:
        _check_same(folder, json.loads(stamp.read_text())["source"], source)
    if isinstance(recipe.data, RegionData):
        proposals.prepare(builder, (recipe.data.train_split, recipe.data.test_split))
    return builder


def digest(builder):
    """What identifies the prepared examples."""
    return json.loads(_stamp(builder).read_text())["digest"]


def fingerprint(folder):
    """Each file's size and time of change, by its path in the folder.

    Without hidden files, which file managers leave.
    """
    files = sorted(path for path in Path(folder).rglob("[!.]*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): [path.stat().st_size, path.stat().st_mtime]
        for path in files
    }


def _stamp(builder):
    return Path(builder.data_path) / "prepared_from.json"


def _content(folder):
    total = hashlib.sha256()
    for path in sorted(folder.glob("*.tfrecord*")):
        total.update(path.read_bytes())
    return total.hexdigest()


def _check_same(prepared, before, source):
    now = fingerprint(source)
    changed = [x for x in {**before, **now} if before.get(x) != now.get(x)]
    if changed:
        raise ValueError(
            f"The data in {prepared} were prepared from other files than those in "
            f"{source} now: {len(changed)} differ in name, size or time, the first: "
            f"{changed[0]}. Remove that folder to prepare them anew, or give another "
            "one with --runs"
        )
