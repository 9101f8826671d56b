"""From a TFDS builder to batches: one file for each kind of example."""
