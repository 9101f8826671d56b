"""The recipes: one small file each, with a `RECIPE`."""
