"""Random checkpoints of the model families, for this project's tests and benchmarks and for those of its users."""
