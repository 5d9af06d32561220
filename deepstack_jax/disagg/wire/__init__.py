"""What both sides share: the buffers, the messages, and what crosses between nodes."""
