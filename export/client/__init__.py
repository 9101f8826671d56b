"""What asks a served model: TF Serving's or the preview's.

Installed without TensorFlow, from this folder, as `keras_cross_stitch_client`.
"""

from .client import Client
from .protocol import ServingError

__all__ = ["Client", "ServingError"]
