"""Kernels of Qwen3-VL-MoE. Each op is a folder: a dispatching function and one file per backend. Imports only jax."""
