"""How a step's gradients are made of the tasks': PCGrad, in the place of their sum."""

from typing import Any

import keras
import tensorflow as tf

from keras_cross_stitch.loss_weighting import TaskWeights


class PCGrad(keras.Model):
    """A functional model whose `fit` leaves what of a task's gradient hurts another.

    What the gradient of a task has against that of another is taken out of it, for one
    other after the other, in random order (Yu et al., 2020). That is done to weights
    that several tasks reach; all others, those of the losses, and what regularizers
    add, are left as they are. A step then goes back through the network once for each
    task.

    Over replicas the tasks' gradients are summed first, so that a step is that of one
    device.

    Reference:

    - [Yu et al., 2020](https://arxiv.org/abs/2001.06782), Algorithm 1
    """

    def compile(self, *args: Any, loss_weights: Any = None, **options: Any) -> None:
        super().compile(*args, loss_weights=loss_weights, **options)
        self.task_weights = loss_weights or {}

    def train_step(self, data: Any) -> dict[str, Any]:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape(persistent=True) as tape:
            y_pred = self(x, training=True)
            total = self.compute_loss(x, y, y_pred, sample_weight, training=True)
            of_tasks = [
                self.task_weights.get(task, 1.0) * loss(y[task], y_pred[task])
                for task, loss in self.loss.items()
            ]
            replicas = tf.distribute.get_strategy().num_replicas_in_sync
            regularized = sum(self.losses, tf.zeros([])) / replicas
            scaled = [self.optimizer.scale_loss(z) for z in (*of_tasks, regularized)]
        variables = self.trainable_variables
        *gradients, decay = [tape.gradient(z, variables) for z in scaled]
        del tape
        of_losses = {
            id(variable)
            for layer in self.layers
            if isinstance(layer, TaskWeights)
            for variable in layer.trainable_variables
        }
        left = {k for k, variable in enumerate(variables) if id(variable) in of_losses}
        summed = _projected(gradients, self.optimizer.iterations, left)
        added = [
            (d if g is None else g if d is None else g + d, variable)
            for g, d, variable in zip(summed, decay, variables, strict=True)
        ]
        self.optimizer.apply_gradients(added)
        # A replica's losses are divided by the number of replicas.
        (tracker,) = (metric for metric in self.metrics if metric.name == "loss")
        tracker.update_state(total * replicas)
        return self.compute_metrics(x, y, y_pred, sample_weight)


def pcgrad_weights(products: tf.Tensor, orders: tf.Tensor) -> tf.Tensor:
    """What PCGrad's gradient is, as a weighted sum of the tasks'.

    Each projected gradient is a sum of those given, so their products are enough.

    Args:
        products: `(T, T)`, the inner products of the tasks' gradients.
        orders: `(T, T)` integers: in row i, the tasks in the order in which the
            gradient of task i is projected; itself is passed over.

    Returns:
        The weights, `(T,)`.
    """
    tasks = products.shape[0]
    total = tf.zeros(tasks, products.dtype)
    for i in range(tasks):
        of_task = tf.one_hot(i, tasks, dtype=products.dtype)
        for j in tf.unstack(orders[i], tasks):
            along = tf.reduce_sum(of_task * tf.gather(products, j))
            against = tf.where(j == i, tf.zeros_like(along), tf.minimum(along, 0))
            length = tf.gather(tf.linalg.diag_part(products), j)
            away = tf.math.divide_no_nan(against, length)
            of_task -= away * tf.one_hot(j, tasks, dtype=products.dtype)
        total += of_task
    return total


def _projected(gradients: list[list[Any]], step: Any, left: set[int]) -> list[Any]:
    """One gradient a variable: the sum over tasks, of weights of several PCGrad's.

    Those of the variables `left`, by number, are summed plainly.
    """
    together = zip(*gradients, strict=True)
    by_variable = [[g for g in of_tasks if g is not None] for of_tasks in together]
    shared = [k for k, x in enumerate(by_variable) if len(x) > 1 and k not in left]
    summed = [sum(x[1:], x[0]) if x else None for x in by_variable]
    if not shared:
        return summed
    of_shared = [
        [tf.zeros_like(by_variable[k][0]) if x[k] is None else x[k] for k in shared]
        for x in gradients
    ]
    replica = tf.distribute.get_replica_context()
    replicas = replica.num_replicas_in_sync
    if replicas > 1:
        of_shared = [replica.all_reduce("SUM", x) for x in of_shared]
    products = [
        tf.stack([_product(one, other) for other in of_shared]) for one in of_shared
    ]
    tasks = len(gradients)
    # By the step, so that a resumed run draws what it would have drawn.
    seed = tf.stack([0, tf.cast(step, "int32")])
    orders = tf.argsort(tf.random.stateless_uniform([tasks, tasks], seed))
    weights = tf.unstack(pcgrad_weights(tf.stack(products), orders) / replicas)
    for k, of_tasks in zip(shared, zip(*of_shared, strict=True), strict=True):
        summed[k] = sum(w * g for w, g in zip(weights, of_tasks, strict=True))
    return summed


def _product(one: list[Any], other: list[Any]) -> tf.Tensor:
    return tf.add_n([tf.reduce_sum(a * b) for a, b in zip(one, other, strict=True)])
