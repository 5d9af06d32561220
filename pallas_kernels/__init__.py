"""Kernels of Qwen3-VL-MoE. Each op is a folder with a dispatching function and one file per backend.

Outside the standard library, this package imports only jax.
"""
