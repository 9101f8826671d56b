"""A stand-in for TF Serving on one's own machine."""
