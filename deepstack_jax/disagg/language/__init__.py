"""The language side: the encode nodes that it uses, its pool, and what arrives in it."""
