"""Reads and writes checkpoints: Hugging Face directories, and the Orbax directories that conversion makes."""
