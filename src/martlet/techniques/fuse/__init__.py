"""The same function in fewer operations."""
