"""From a saved .keras file to a served model."""
