"""Training: the step, the loop around it, optimisers and schedules, checkpoints, logging."""
