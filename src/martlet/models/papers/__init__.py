"""What the papers state of the models, and what was counted and measured of them here."""
