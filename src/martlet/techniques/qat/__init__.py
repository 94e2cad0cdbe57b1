"""Quantized models that are trained as they are rounded."""
