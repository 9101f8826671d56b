"""NYUv2 at a size that two CPU cores train: segmentation and surface normals.

Data: the 795 train and 654 test images at 320x240, targets at 160x120, 40
classes, normals derived from depth. The tower is FCN-32s on an AlexNet of a
quarter of the width, from scratch.

It takes 80 minutes on two CPU cores in float32. No table has it: from scratch, 795
images teach about 14 % of mIoU, where `nyuv2_pretrained` has 27.

    python -m training fit nyuv2 --data DIR
"""

from training.recipes import Data, FcnAlexNet, Recipe, Schedule, Training, Units

RECIPE = Recipe(
    name="nyuv2",
    data=Data(
        dataset="nyuv2",
        config="full",
        train_split="train",
        test_split="test",
        tasks=("segmentation", "normals"),
        image_size=(240, 320),
        target_size=(120, 160),
        smallest_crop=0.8,
        colour=0.2,
        label_fraction=("segmentation", 1.0),
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
        alpha_multiplier=100,
    ),
    splits=("conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "score"),
    best_split="conv4",
    training=Training(
        batch_size=16, momentum=0.9, loss_weighting=None, dtype="float32"
    ),
    single_task=Schedule(epochs=40, learning_rate=0.05),
    finetuning=Schedule(epochs=15, learning_rate=0.01),
)
