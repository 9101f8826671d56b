"""NYUv2 from a pretrained backbone, EfficientNet-Lite0 or any other of its names.

Data as in `nyuv2`, flips only. All up to stride 8 is frozen, its batch normalisation
too: it stays the same in all towers, so that it is computed once, and its gradients,
of depthwise convolutions over large maps, would be what costs on a CPU.

The units' start and alpha's rate are those that were best on a fifth of train, of seed
0 (`study nyuv2_pretrained search`, docs/results.md). More epochs gain more: twice as
many raised the baseline's Delta_m by 2.8 there. All methods have the same few.

    python -m training fit nyuv2_pretrained --data DIR --backbone FILE
"""

from pathlib import Path

from training.recipes import Data, Recipe, SavedBackbone, Schedule, Training, Units

RECIPE = Recipe(
    name="nyuv2_pretrained",
    data=Data(
        dataset="nyuv2",
        config="full",
        train_split="train",
        test_split="test",
        tasks=("segmentation", "normals"),
        image_size=(240, 320),
        target_size=(120, 160),
        smallest_crop=1.0,
        colour=0.0,
        label_fraction=("segmentation", 1.0),
    ),
    tower=SavedBackbone(
        backbone=Path("../shared/models/efficientnet_lite0.keras"),
        frozen_to="block4_output",
        dropout=0.5,
        pixel_range=None,
    ),
    units=Units(
        at=("block7_output", "block10_output", "block14_output", "block15_output"),
        per="channel",
        same_task=1.0,
        alpha_multiplier=2,  # alpha's own rate is 0.1 from the start
    ),
    splits=(
        "block7_expand_conv",
        "block9_expand_conv",
        "block11_expand_conv",
        "block13_expand_conv",
        "block15_expand_conv",
        "score",
    ),
    best_split="block11_expand_conv",
    # Depthwise convolutions in bfloat16 are slow: a step takes 1.7 times as long.
    training=Training(
        batch_size=16, momentum=0.9, loss_weighting=None, dtype="float32"
    ),
    single_task=Schedule(epochs=6, learning_rate=0.05),
    finetuning=Schedule(epochs=4, learning_rate=0.02),
)
