"""Which kernel runs: backends, the native module, tuning tables."""
