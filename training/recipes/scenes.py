"""Rendered rooms: segmentation and surface normals, in minutes.

Data: 400 train and 100 test images of 128x96, 19 classes. The images are doubled,
so that a cell of FCN-32s stands for 16 of their pixels.

The demo is this recipe with segmentation labels on a tenth of the images.
docs/results.md has what comes out.

    python -m training
    python -m training study scenes methods --seeds 3
"""

from training.recipes import Data, FcnAlexNet, Recipe, Schedule, Training, Units

RECIPE = Recipe(
    name="scenes",
    data=Data(
        dataset="scenes",
        config="full",
        train_split="train",
        test_split="test",
        tasks=("segmentation", "normals"),
        image_size=(192, 256),
        target_size=(96, 128),
        smallest_crop=1.0,
        colour=0.0,
        label_fraction=("segmentation", 1.0),
    ),
    tower=FcnAlexNet(
        width=0.125,
        normalization="batch",
        dropout=0.0,
        weight_decay=5e-4,
        common_start=True,
    ),
    units=Units(
        at=("pool1", "pool2", "pool5", "fc6", "fc7"),
        per="channel",
        same_task=0.9,
        alpha_multiplier=10,  # 100 costs the normals half a degree
    ),
    splits=("conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "score"),
    best_split="conv4",
    training=Training(
        batch_size=16, momentum=0.9, loss_weighting=None, dtype="float32"
    ),
    single_task=Schedule(epochs=14, learning_rate=0.05),
    finetuning=Schedule(epochs=6, learning_rate=0.01),
)
