"""The training loop: loss, optimizer and schedule, checkpoints, what is logged."""
