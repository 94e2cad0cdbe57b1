"""Structure taken out of the model: heads, dimensions, hidden units, width, blocks."""
