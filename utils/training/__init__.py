"""The training loop: loss, optimizer and schedule, what fits into memory, checkpoints, --preflight."""
