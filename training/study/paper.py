"""The paper's figures, to stand beside ours (Misra et al., CVPR 2016).

They stand beside the recipes with the paper's tower, at full size and with all labels.

By data set and study; the methods under the names that they have here.
"""

_NYUV2 = [
    ("normals", "mean_angle"),
    ("normals", "median_angle"),
    ("normals", "within_11_25"),
    ("normals", "within_22_5"),
    ("normals", "within_30"),
    ("segmentation", "pixel_accuracy"),
    ("segmentation", "miou"),
    ("segmentation", "fwiou"),
]
_VOC2008 = [("detection", "mean_ap_voc2008"), ("attributes", "mean_ap")]

Table = dict[str, dict[tuple[str, str], float]]

TABLES: dict[tuple[str, str], dict[str, tuple[float, ...]]] = {
    # Table 1: what alpha starts at
    ("nyuv2", "init"): {
        "cross_stitch@same_task=0.1": (34.6, 18.8, 38.5, 53.7, 59.4, 47.9, 18.2, 33.3),
        "cross_stitch@same_task=0.5": (34.4, 18.8, 38.5, 53.7, 59.5, 47.2, 18.6, 33.8),
        "cross_stitch@same_task=0.7": (34.0, 18.3, 38.9, 54.3, 60.1, 48.0, 18.6, 33.6),
        # The paper's own setting, and the recipe's
        "cross_stitch": (34.0, 18.3, 39.0, 54.4, 60.2, 48.2, 18.9, 34.0),
    },
    # Table 2: how much faster alpha learns
    ("nyuv2", "alpha-rate"): {
        "cross_stitch@alpha_multiplier=1": (
            *(34.6, 18.9, 38.4, 53.7, 59.4),
            *(47.7, 18.6, 33.5),
        ),
        "cross_stitch@alpha_multiplier=10": (
            *(34.5, 18.8, 38.5, 53.8, 59.5),
            *(47.8, 18.7, 33.5),
        ),
        "cross_stitch": (  # 100
            *(34.0, 18.3, 39.0, 54.4, 60.2),
            *(48.0, 18.9, 33.8),
        ),
        "cross_stitch@alpha_multiplier=1000": (
            *(34.1, 18.2, 39.2, 54.4, 60.2),
            *(47.2, 19.3, 34.0),
        ),
    },
    # Table 3: what the towers start from, ImageNet's weights or single-task networks
    ("nyuv2", "tower-init"): {
        "cross_stitch_from_start": (34.6, 18.8, 38.6, 53.7, 59.4, 48.0, 17.7, 33.4),
        "cross_stitch": (34.1, 18.2, 39.0, 54.4, 60.2, 47.2, 19.3, 34.0),
    },
    # Table 5
    ("nyuv2", "methods"): {
        "single_task": (34.8, 19.0, 38.3, 53.5, 59.2, 46.6, 18.4, 33.1),
        "ensemble": (34.4, 18.5, 38.7, 54.2, 59.7, 48.2, 18.9, 33.8),
        "split@conv4": (34.7, 19.1, 38.2, 53.4, 59.2, 47.8, 19.2, 33.8),
        "hard_sharing": (34.7, 18.9, 37.7, 53.5, 58.8, 45.9, 16.6, 30.1),
        "cross_stitch": (34.1, 18.2, 39.0, 54.4, 60.2, 47.2, 19.3, 34.0),
    },
    # Table 6
    ("voc2008", "methods"): {
        "single_task": (44.9, 60.9),
        "ensemble": (46.1, 61.1),
        "split@conv2": (44.6, 61.0),
        "split@fc7": (44.8, 59.7),
        "hard_sharing": (42.7, 54.1),
        "cross_stitch": (45.2, 63.0),
    },
}

_LAYERS = ("score", "fc7", "fc6", "conv5", "conv4", "conv3", "conv2")  # score is fc8

# Figure 2b: the difference to single-task networks of a split at each layer
_SPLITS = {
    "attributes": (-5.7, -2.2, -1.2, -0.8, -1.0, -0.4, 0.1),
    "detection": (-0.16, 0.69, -0.06, -0.09, 0.37, 0.24, -0.34),
    "segmentation": (-0.4, 0.11, -0.62, 0.22, 0.80, -0.28, -1.32),  # mIoU
}


_DATASETS = {"nyuv2": "nyuv2", "voc2008_alexnet": "voc2008"}  # by recipe


def table(recipe: str, study: str) -> Table:
    """The paper's table as `{method: {(task, metric): value}}`; empty without one."""
    dataset = _DATASETS.get(recipe, "")
    columns = {"nyuv2": _NYUV2, "voc2008": _VOC2008}.get(dataset, [])
    return {
        method: dict(zip(columns, values, strict=True))
        for method, values in TABLES.get((dataset, study), {}).items()
    }


def splits(recipe: str) -> dict[tuple[str, str], dict[str, float]]:
    """Figure 2b as `{(task, metric): {layer: difference}}`; empty without one."""
    columns = {"nyuv2": [("segmentation", "miou")], "voc2008": _VOC2008}
    return {
        (task, metric): dict(zip(_LAYERS, _SPLITS[task], strict=True))
        for task, metric in columns.get(_DATASETS.get(recipe, ""), ())
    }
