"""Images: where they come from, how a model wants them, and samples of them for calibration."""
