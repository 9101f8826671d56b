"""What a model costs: parameters, and multiply-adds for an example."""

import keras
import tensorflow as tf


def count(model: keras.Model, free: int = 1) -> dict[str, int]:
    """The parameters of a model, and its multiply-adds for one example.

    Those of convolutions and matrix products; all else is cheap beside them, and is not
    counted.

    Args:
        model: A Keras model.
        free: Integer, what it is counted for where a size of an input is free, as
            that of the regions is.

    Returns:
        Dict of `parameters` and `multiply_adds`.
    """
    spec = keras.tree.map_structure(
        lambda x: tf.TensorSpec([1, *(size or free for size in x.shape[1:])], x.dtype),
        model.input,
    )
    graph = tf.function(model).get_concrete_function(spec).graph
    return {
        "parameters": model.count_params(),
        "multiply_adds": sum(map(_multiply_adds, graph.get_operations())),
    }


def _multiply_adds(operation: tf.Operation) -> int:
    """For each number of the answer, as many as it is a sum of products."""
    if operation.type in ("Conv2D", "Conv3D"):
        summed = operation.inputs[1].shape[:-1].num_elements()
    elif operation.type == "DepthwiseConv2dNative":
        summed = operation.inputs[1].shape[:2].num_elements()
    elif operation.type == "MatMul":
        summed = operation.inputs[0].shape[
            0 if operation.get_attr("transpose_a") else 1
        ]
    elif operation.type in ("BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"):
        summed = operation.inputs[0].shape[-2 if operation.get_attr("adj_x") else -1]
    else:
        return 0
    return summed * operation.outputs[0].shape.num_elements()
