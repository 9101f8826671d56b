"""A data set of one's own, from a folder of images and label maps: two segmentations.

`training/datasets/folder.py` says how the folder is laid out. Copy this file under
another name, which the prepared data then have, and change what is said here: the
tasks, each a sub-folder, with its kind of task where that has another name; and the
sizes. Images are resized, and targets are every so many-th pixel of what is stored.

    python -m training fit folder --data DIR --tasks parts:segmentation,depth --toy
"""

from training.recipes import Data, FcnAlexNet, Recipe, Schedule, Training, Units

RECIPE = Recipe(
    name="folder",
    data=Data(
        dataset="folder",
        config="full",
        train_split="train",
        test_split="test",
        tasks=("parts:segmentation", "materials:segmentation"),
        image_size=(192, 256),
        target_size=(96, 128),
        smallest_crop=0.8,
        colour=0.2,
        label_fraction=("parts", 1.0),
    ),
    tower=FcnAlexNet(
        width=0.25,
        normalization="batch",
        dropout=0.5,
        weight_decay=5e-4,
        common_start=True,
    ),
    units=Units(
        at=("pool1", "pool2", "pool5", "fc6", "fc7"),
        per="channel",
        same_task=0.9,
        alpha_multiplier=10,
    ),
    splits=("conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "score"),
    best_split="conv4",
    training=Training(
        batch_size=16, momentum=0.9, loss_weighting=None, dtype="float32"
    ),
    single_task=Schedule(epochs=40, learning_rate=0.05),
    finetuning=Schedule(epochs=15, learning_rate=0.01),
)
