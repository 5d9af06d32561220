"""Both sides share this: the buffers, the control messages, and the layout of what crosses between nodes."""
