"""Where a model trains: on which devices, and with which other workers.

A worker is a process. All workers run the same program on the same folder of runs;
the chief alone writes there.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf


def strategy(replicas: int | None = None) -> tf.distribute.Strategy:
    """The `tf.distribute` strategy to train under: one for a process, made first.

    Args:
        replicas: Integer, a number of logical CPUs to mirror the model over, for
            testing; `None` for what the environment says.

    Returns:
        A `MultiWorkerMirroredStrategy` where `TF_CONFIG` names workers, a
        `MirroredStrategy` where there are several GPUs, else the default.
    """
    if replicas:
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0],
            [tf.config.LogicalDeviceConfiguration()] * replicas,
        )
        return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(replicas)])
    if os.environ.get("TF_CONFIG"):
        return tf.distribute.MultiWorkerMirroredStrategy()
    if len(tf.config.list_physical_devices("GPU")) > 1:
        return tf.distribute.MirroredStrategy()
    return tf.distribute.get_strategy()


def workers(strategy: tf.distribute.Strategy) -> int:
    """How many workers train together."""
    resolver = strategy.cluster_resolver
    jobs = resolver.cluster_spec().as_dict() if resolver else {}
    return sum(len(jobs.get(job, ())) for job in ("chief", "worker")) or 1


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Whether this worker is the one that writes files."""
    if workers(strategy) == 1:
        return True
    resolver = strategy.cluster_resolver
    first = "chief" if "chief" in resolver.cluster_spec().jobs else "worker"
    return (resolver.task_type, resolver.task_id) == (first, 0)


def from_chief(strategy: tf.distribute.Strategy, number: int) -> int:
    """The chief's whole number, on every worker; none goes on before all are here.

    What decides the way that all go comes from here: a shared folder may show a new
    file to one worker later than to another.
    """
    if workers(strategy) == 1:
        return number
    local = strategy.num_replicas_in_sync // workers(strategy)
    mine = float(number) if is_chief(strategy) else 0.0
    with lost_workers_named():
        of_replicas = strategy.run(tf.function(lambda: tf.constant(mine)))
        total = strategy.reduce("SUM", of_replicas, axis=None)
    return round(float(total) / local)


@contextlib.contextmanager
def lost_workers_named() -> Iterator[None]:
    """Raises a ConnectionError when another worker has ended."""
    try:
        yield
    except tf.errors.UnavailableError as error:
        raise ConnectionError(
            "Another worker is lost. Start all of them again, and the run goes on from "
            f"its last backup. {error.message.splitlines()[0]}"
        ) from error


def batches_of_replicas(
    strategy: tf.distribute.Strategy,
    batch_size: int,
    make: Callable[[np.ndarray], tf.data.Dataset],
) -> tf.distribute.DistributedDataset:
    """The batches, in equal parts for the replicas; a worker makes its own alone.

    Args:
        strategy: The `tf.distribute` strategy.
        batch_size: Integer, over all replicas.
        make: Function from an array of rows of a batch to the `tf.data.Dataset` of
            batches that have these rows only.

    Raises:
        ValueError: If the batch cannot be divided by the replicas.
    """

    def of_worker(context: tf.distribute.InputContext) -> tf.data.Dataset:
        size = context.get_per_replica_batch_size(batch_size)
        # Every so many-th row, so that each replica has its share of those examples
        # that have labels, which are the first half of a batch.
        rows = np.arange(batch_size).reshape(size, -1).T
        rows = rows.reshape(context.num_input_pipelines, -1)[context.input_pipeline_id]
        return make(rows) if len(rows) == size else make(rows).rebatch(size)

    return strategy.distribute_datasets_from_function(of_worker)


def traffic(model: keras.Model, replicas: int) -> int:
    """Bytes that a replica sends in a step, and as many that it receives.

    The gradients are summed round a ring of R replicas, each of which sends (R - 1) / R
    of their size as it adds, and as much as it hands on the sums. The losses of the
    logs are a few bytes more.

    Args:
        model: The model, built. Its variables, and so the gradients, are float32 under
            mixed precision, too.
        replicas: Integer R.
    """
    gradients = sum(
        math.prod(variable.shape) * np.dtype(variable.dtype).itemsize
        for variable in model.trainable_variables
    )
    return round(2 * (replicas - 1) / replicas * gradients)


def for_current_strategy(
    model: keras.Model, kind: type[keras.Model] = keras.Model
) -> keras.Model:
    """The model, not yet compiled, as it can be fitted under the strategy in scope.

    Args:
        model: A functional model.
        kind: The class whose train step it is fitted with.
    """
    if workers(tf.distribute.get_strategy()) > 1:
        kind = type("MultiWorkerModel", (MultiWorkerModel, kind), {})
    elif kind is keras.Model:
        return model
    return kind(model.input, model.output, name=model.name)


def build_losses(model: keras.Model, target: Mapping[str, tf.Tensor]) -> None:
    """Makes the metrics of a compiled model's losses, which Keras makes in a step.

    Args:
        model: The compiled model.
        target: `{task: targets}` of a batch of any size.
    """
    # What the model leaves open, the batch and its RoIs, is as in the targets.
    logits = {
        name: keras.ops.zeros(
            [n or target[name].shape[axis] for axis, n in enumerate(output.shape)]
        )
        for name, output in model.output.items()
    }
    regularized = [(x, x) for x in model.trainable_variables if x.regularizer]
    # What it computes is left: only what it makes stays.
    with keras.StatelessScope(regularized):
        model.compute_loss(y=target, y_pred=logits)


class MultiWorkerModel(keras.Model):
    """A functional model whose `fit` works under `MultiWorkerMirroredStrategy`.

    Keras 3.15's own does not. It builds what is not built by a look at the first batch,
    which it hands whole to `strategy.reduce`, which takes one value; `build_losses`
    leaves nothing to build. And it takes the mean of the logs over their first axis,
    which scalars lack.
    """

    # Private: the look at the first batch.
    def _maybe_symbolic_build(
        self, iterator: Any = None, data_batch: Any = None
    ) -> None:
        pass

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        logs = super().train_step(data)
        return {name: tf.reshape(value, [1]) for name, value in logs.items()}
