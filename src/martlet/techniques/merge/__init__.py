"""Techniques that make one model of several."""
