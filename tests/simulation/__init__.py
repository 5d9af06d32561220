"""A cluster in one process, from one seed: the product's own code on a simulated network, memory, clock and threads."""
