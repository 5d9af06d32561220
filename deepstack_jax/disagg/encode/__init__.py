"""The encode side: pictures to rows, and their writes into the pools of language nodes."""
