"""Stop early: exits, cascades, and which images take them."""
