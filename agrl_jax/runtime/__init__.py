"""What a run needs around the algorithm: configuration, devices, optimiser, checkpoints, logs."""
