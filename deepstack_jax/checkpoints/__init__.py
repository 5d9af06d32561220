"""Reading and writing checkpoints: Hugging Face directories, and the Orbax directories that conversion makes."""
