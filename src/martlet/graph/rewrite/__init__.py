"""Rewrites of a traced graph that leave its logits as they are."""
