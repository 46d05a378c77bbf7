"""How good features are: one protocol a file; `run.evaluate` goes through them."""
