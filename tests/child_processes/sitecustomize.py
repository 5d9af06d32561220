"""Hides PyTorch from the Python processes that tests start.

Users' environments have none, and transformers' import of it takes seconds and 600 MB per process.
`deepstack-jax verify` compares with PyTorch, so it keeps it.
"""

import sys

if "verify" not in sys.orig_argv:
    sys.modules["torch"] = None  # type: ignore[assignment]
