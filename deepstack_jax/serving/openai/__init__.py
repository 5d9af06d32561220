"""OpenAI's HTTP API: chat completions, completions, responses, models, and the tokenizer's endpoints."""
