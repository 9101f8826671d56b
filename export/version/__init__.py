"""What a version holds: signatures, recorded predictions, and how long it takes."""
