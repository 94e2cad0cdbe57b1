"""Fewer tokens in later blocks."""
