"""The demo: rendered rooms, segmentation and surface normals, in minutes.

Data: 400 train and 100 test images of 128x96, 19 classes. The images are doubled,
so that a cell of FCN-32s stands for 16 of their pixels.

On two CPU cores in 5.5 minutes, seed 0, one_task / one_task_longer / cross_stitch:
mean IU 20.3 / 20.7 / 20.5 %, mean angle 26.2 / 26.1 / 26.8 degrees.

    python -m training
"""

from training.recipe import Recipe

RECIPE = Recipe(
    name="scenes",
    dataset="scenes",
    config="full",
    train_split="train",
    test_split="test",
    tasks=("segmentation", "normals"),
    image_size=(192, 256),
    target_size=(96, 128),
    smallest_crop=1.0,
    colour=0.0,
    width=0.125,
    normalization="batch",
    dropout=0.0,
    at=("pool1", "pool2", "pool5", "fc6", "fc7"),
    per="channel",
    same_task=0.9,
    batch_size=16,
    momentum=0.9,
    weight_decay=5e-4,
    epochs=14,
    learning_rate=0.05,
    extra_epochs=6,
    extra_learning_rate=0.01,
    alpha_multiplier=100,
)
