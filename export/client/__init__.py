"""What asks a served model: TF Serving's or the preview's."""

from export.client.client import Client
from export.client.protocol import ServingError

__all__ = ["Client", "ServingError"]
