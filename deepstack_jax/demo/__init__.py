"""Drawn pictures, pairs and clips with questions about them and their right answers, endless by seed.

`scenes` and `changes` decide what there is, `rendering` draws it, `questions` asks, and `samples` ties them together.
The shipped checkpoint tiny-vl was trained on them; `deepstack-jax demo` asks it about pictures that it has not seen.
"""
