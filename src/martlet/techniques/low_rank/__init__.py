"""low_rank: products of thin matrices in the place of wide ones."""
