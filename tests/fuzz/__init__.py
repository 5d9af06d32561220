"""Fuzzing of what reads bytes from outside: `make fuzz SECONDS=600`; tests/test_fuzz_corpus.py replays the corpus."""
