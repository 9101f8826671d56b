"""What looks at a version: do its answers hold, what do they cost."""
