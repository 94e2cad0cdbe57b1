"""One set of weights for several layers."""
