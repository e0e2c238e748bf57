"""Text to tokens to batches.

corpus (embedded English text) -> clean (filters) -> tokenizer -> prepare (writes a dataset directory)
-> format (reads and verifies it) -> order (keyed permutation of samples) -> loader (batches of every rank).
"""
