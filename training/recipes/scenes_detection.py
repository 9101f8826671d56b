"""Rendered rooms: detection and attributes, the paper's second pair, in minutes.

Data: the rooms of `scenes`, 16 classes and 16 attributes, doubled to 192x256;
proposals by selective search. Fast R-CNN on an AlexNet of a quarter of the width, from
scratch.

    python -m training fit scenes_detection
"""

from training.recipes import (
    FastRcnnAlexNet,
    Recipe,
    RegionData,
    Schedule,
    Training,
    Units,
)

RECIPE = Recipe(
    name="scenes_detection",
    data=RegionData(
        dataset="scenes",
        config="full",
        train_split="train",
        test_split="test",
        tasks=("detection", "attributes"),
        image_size=(192, 256),
        proposals=1000,
        sampled=32,
    ),
    tower=FastRcnnAlexNet(
        width=0.25,
        normalization="batch",
        dropout=0.0,
        weight_decay=5e-4,
        common_start=True,
        weights=None,
    ),
    units=Units(
        at=("pool1", "pool2", "pool5", "fc6", "fc7"),
        per="layer",
        same_task=0.9,
        alpha_multiplier=10,
    ),
    splits=("conv2", "fc7"),
    best_split="conv2",
    training=Training(batch_size=8, momentum=0.9, loss_weighting=None, dtype="float32"),
    single_task=Schedule(epochs=14, learning_rate=0.02),
    finetuning=Schedule(epochs=6, learning_rate=0.01),
)
