"""Normalization that costs nothing at run time."""
