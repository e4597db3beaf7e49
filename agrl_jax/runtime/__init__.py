"""The parts of a run around the algorithm: configuration, devices, optimiser, checkpoints, logs."""
