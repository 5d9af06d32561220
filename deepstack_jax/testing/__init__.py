"""What tests and benchmarks share, the project's own and those of its users: random checkpoints of every family."""
