"""Training: configuration, the loop, checkpoints, logging, the report."""
