"""The encode side: turns images and videos into rows and writes them into the receive pools of language nodes."""
