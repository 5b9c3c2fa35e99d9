"""Training: one loop, fed by each task and model family."""
