"""Grids, ranges, rounding: the arithmetic of numbers of few bits."""
