"""VOC 2008 as in the paper: Fast R-CNN on AlexNet, from scratch or from its weights.

Data as in `voc2008`. The paper's towers have ImageNet's weights:

    python -m training fit voc2008_alexnet --data DIR --weights alexnet.npz

The `.npz` has torchvision's names or Caffe's layers (training/alexnet_weights.py).
Without them, from scratch, it is here for the record.
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
    name="voc2008_alexnet",
    data=RegionData(
        dataset="voc2008",
        config="full",
        train_split="train",
        test_split="test",
        tasks=("detection", "attributes"),
        image_size=(256, 256),
        proposals=1000,
        sampled=32,
    ),
    tower=FastRcnnAlexNet(
        width=1.0,
        normalization="local_response",
        dropout=0.5,
        weight_decay=5e-4,
        common_start=True,
        weights=None,
    ),
    units=Units(
        at=("pool1", "pool2", "pool5", "fc6", "fc7"),
        per="layer",
        same_task=0.9,
        alpha_multiplier=100,
    ),
    splits=("conv2", "fc7"),
    best_split="conv2",
    training=Training(batch_size=8, momentum=0.9, loss_weighting=None, dtype="float32"),
    single_task=Schedule(epochs=12, learning_rate=1e-3),
    finetuning=Schedule(epochs=6, learning_rate=1e-3),
)
