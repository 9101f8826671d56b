"""The devices to train on."""

import tensorflow as tf


def strategy(replicas=None):
    """The `tf.distribute` strategy to train under.

    Args:
        replicas: Integer, a number of logical CPUs to mirror the model over, for
            testing; `None` for the GPUs that there are.

    Returns:
        A `MirroredStrategy` where there are several devices, else the default.
    """
    if replicas:
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0],
            [tf.config.LogicalDeviceConfiguration()] * replicas,
        )
        return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(replicas)])
    if len(tf.config.list_physical_devices("GPU")) > 1:
        return tf.distribute.MirroredStrategy()
    return tf.distribute.get_strategy()
