"""Merging: several fine-tunes of one model become one, of the same size and speed."""
