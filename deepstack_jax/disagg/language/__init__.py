"""The language side: connects to encode nodes, owns the receive pool, and collects the rows that arrive in it."""
