"""The view of each library's models."""
