"""Measuring: load for servers that speak OpenAI's API, and the speed of a checkpoint on this machine."""
