"""Facts: what is true of a model at a point in a recipe.

A technique states which facts it requires and which it breaks. That replaces a table of which technique may follow
which: N × 6 entries in place of N × N.
"""

from __future__ import annotations

from enum import StrEnum


class Fact(StrEnum):
    MODULE = "module"
    """The model is an editable `nn.Module`; broken by the trace that graph techniques need."""
    GRAPH = "graph"
    """The model is, or can be traced to, an editable graph; broken by settings of the engine."""
    ALL_TOKENS = "all_tokens"
    """Every block computes every token."""
    ONE_EXIT = "one_exit"
    """No image leaves before the last block, so nothing hangs on the blocks as they are."""
    UNFUSED = "unfused"
    """Batch norms and training-time branches still stand apart."""
    WHOLE_LINEARS = "whole_linears"
    """Every linear map is a Linear of its own: no factors of it stand in its place, and no other layer shares it."""
    FLOAT_WEIGHTS = "float_weights"
    """Linear and convolution weights are floating point."""
    FLOAT_ACTIVATIONS = "float_activations"
    """No activation has been rounded."""
    FREE_PRECISION = "free_precision"
    """Nothing has yet said in which precision the engine runs the floating-point parts."""


ALL_FACTS = frozenset(Fact)
