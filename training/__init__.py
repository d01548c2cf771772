"""What surrounds the training loop: preparation, the log, preemption, and the guard against non-finite steps."""
