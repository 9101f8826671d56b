"""What makes a version of a .keras file."""
