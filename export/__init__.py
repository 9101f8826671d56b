"""From a saved .keras file to a served model."""

NAME = "cross_stitch"  # of the served model: the commands', the client's, tf_serving's
