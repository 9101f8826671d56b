"""Ready-made models at their smallest, with random weights, and towers of them."""

import importlib
import inspect
import re

import keras

_WORDS = {
    "vocabulary_size": 50,
    "num_layers": 3,
    "num_heads": 2,
    "hidden_dim": 16,
    "intermediate_dim": 32,
    "max_sequence_length": 12,
}
_RESIDUAL = {
    "stackwise_filters": [64, 64],
    "stackwise_blocks": [2, 2],
    "stackwise_strides": [1, 2],
    "block_type": "block",
    "include_rescaling": True,
    "input_shape": (32, 32, 3),
}
# The classes named after presets (ResNet18Backbone) want a download.
BACKBONES = {
    "keras_hub BertBackbone": _WORDS,
    "keras_hub RobertaBackbone": _WORDS,
    "keras_hub DistilBertBackbone": {
        "vocabulary_size": 50,
        "num_layers": 2,
        "num_heads": 2,
        "hidden_dim": 12,
        "intermediate_dim": 24,
        "max_sequence_length": 12,
    },
    "keras_hub ResNetBackbone": {
        "input_conv_filters": [64],
        "input_conv_kernel_sizes": [7],
        "stackwise_num_filters": [64, 64],
        "stackwise_num_blocks": [2, 2],
        "stackwise_num_strides": [1, 2],
        "block_type": "basic_block",
        "image_shape": (32, 32, 3),
    },
    "keras_hub ViTBackbone": {
        "image_shape": (32, 32, 3),
        "patch_size": 8,
        "num_layers": 3,
        "num_heads": 2,
        "hidden_dim": 16,
        "mlp_dim": 32,
    },
    "keras_cv ResNetBackbone": _RESIDUAL,
    "keras_cv ResNetV2Backbone": _RESIDUAL,
    "keras_cv MobileNetV3Backbone": {
        "stackwise_expansion": [1, 4],
        "stackwise_filters": [16, 24],
        "stackwise_kernel_size": [3, 3],
        "stackwise_stride": [2, 2],
        "stackwise_se_ratio": [0.25, None],
        "stackwise_activation": ["relu", "hard_swish"],
        "include_rescaling": True,
        "input_shape": (32, 32, 3),
    },
    "keras_cv EfficientNetV2Backbone": {
        "stackwise_kernel_sizes": [3, 3],
        "stackwise_num_repeats": [2, 2],
        "stackwise_input_filters": [16, 16],
        "stackwise_output_filters": [16, 24],
        "stackwise_expansion_ratios": [1, 4],
        "stackwise_squeeze_and_excite_ratios": [0, 0.25],
        "stackwise_strides": [1, 2],
        "stackwise_conv_types": ["fused", "unfused"],
        "width_coefficient": 1.0,
        "depth_coefficient": 1.0,
        "skip_connection_dropout": 0.0,
        "include_rescaling": True,
        "input_shape": (32, 32, 3),
    },
}

# Eight families of `keras.applications`, the quickest to check first, and the smallest
# side of an image that all of them take.
FAMILIES = [
    "VGG16",
    "MobileNetV2",
    "Xception",
    "ResNet50",
    "InceptionV3",
    "ConvNeXtTiny",
    "EfficientNetB0",
    "DenseNet121",
]
SIDE = 75

# Pairs of models that read words.
TEXTS = [
    ("keras_hub RobertaBackbone", "keras_hub DistilBertBackbone"),
    ("LSTM", "Bidirectional LSTM"),
]


def applications():
    """The names of all constructors of `keras.applications`, the largest last."""
    large = re.compile("Large|ConvNeXt|B[3-7]$|V2[ML]$|152|169|201")
    return sorted(
        (
            name
            for name, value in vars(keras.applications).items()
            if inspect.isfunction(value)
        ),
        key=lambda name: (bool(large.search(name)), name),
    )


def backbone(name, side=None):
    """The model without a top; of a size given, or of the smallest that it takes."""
    if name in BACKBONES:
        library, kind = name.split()
        models = importlib.import_module(library).models
        if name in LOADABLE:
            LOADABLE[name]()
        return getattr(models, kind)(**BACKBONES[name])
    if name.endswith("LSTM"):
        return recurrent(name)
    build = getattr(keras.applications, name)
    for n in [side] if side else (32, 48, 64, 71, 75, 96, 128, 224, 331):
        try:
            return build(include_top=False, weights=None, input_shape=(n, n, 3))
        except ValueError as error:
            refusal = error
    raise refusal


def make_vit_loadable():
    """As docs/using.md shows it: its config has more than its constructor takes."""
    from keras_hub.src.models.vit import vit_layers

    class ViTPatchingAndEmbedding(vit_layers.ViTPatchingAndEmbedding):
        @classmethod
        def from_config(cls, config):
            derived = ("num_patches", "num_positions")
            return cls(**{key: x for key, x in config.items() if key not in derived})

    _register(ViTPatchingAndEmbedding)


def make_mobilenet_loadable():
    """Its activation is not registered, and its constructor takes no name."""
    from keras_cv.src.models.backbones.mobilenet_v3 import mobilenet_v3_backbone

    class HardSigmoidActivation(mobilenet_v3_backbone.HardSigmoidActivation):
        def __init__(self, **kwargs):
            super(mobilenet_v3_backbone.HardSigmoidActivation, self).__init__(**kwargs)

    _register(HardSigmoidActivation)


def _register(layer):
    """Keras finds it by the name of the class, and in the file its weights."""
    keras.saving.get_custom_objects()[layer.__name__] = layer


LOADABLE = {
    "keras_hub ViTBackbone": make_vit_loadable,
    "keras_cv MobileNetV3Backbone": make_mobilenet_loadable,
}


def recurrent(name):
    """Two layers that read word by word; word 0 is masked."""
    words = keras.Input((None,), dtype="int32", name="words")
    units = 8 if name == "LSTM" else 5
    x = keras.layers.Embedding(50, units, mask_zero=True, name="embedding")(words)
    for n in (1, 2):
        layer = keras.layers.LSTM(units, return_sequences=True, name=f"lstm{n}")
        if name != "LSTM":
            layer = keras.layers.Bidirectional(layer, name=f"both_ways{n}")
        x = layer(x)
    return keras.Model(words, x)


def tower(name, outputs, nested=False, frozen=False, side=None):
    """The model with a head, flat (on its output) or nested (called as a layer).

    Its first third may be frozen, as a user would who has few labels.
    """
    model = backbone(name, side)
    for layer in model.layers[: len(model.layers) // 3]:
        layer.trainable = not frozen
    inputs, features = model.input, model.output
    if nested:
        inputs = keras.tree.map_structure(
            lambda x: keras.Input(x.shape[1:], dtype=x.dtype, name=x.name), inputs
        )
        features = model(inputs)
    if isinstance(features, dict):
        features = features.get("pooled_output", next(iter(features.values())))
    while len(features.shape) > 2:
        features = keras.ops.mean(features, axis=1)
    return keras.Model(inputs, keras.layers.Dense(outputs, name="task_score")(features))


def layers_of(model, prefix=""):
    """(path, layer) of the layers of a model, those of nested models in their place."""
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from layers_of(layer, f"{prefix}{layer.name}/")
        else:
            yield prefix + layer.name, layer


def two_taps(model):
    """At a third and at two thirds of the layers that can be one."""
    found = [
        path
        for path, layer in layers_of(model)
        if not isinstance(layer, keras.layers.InputLayer)
        and layer.name != "task_score"
        and isinstance(layer.output, keras.KerasTensor)
        and 2 <= len(layer.output.shape) <= 5
        and layer.output.shape[-1] is not None
        and "float" in layer.output.dtype
    ]
    return [found[len(found) // 3], found[2 * len(found) // 3]]
