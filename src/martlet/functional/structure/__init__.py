"""Heads, ranks, saliencies, repairs: the arithmetic of smaller networks."""
