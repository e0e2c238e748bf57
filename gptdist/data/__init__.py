"""Text to tokens to batches.

read, parquet, compressed, corpus (documents) -> clean (runs filters: quality, language, scrub, near_duplicates)
-> tokenizer -> prepare (writes a dataset directory and its report)
-> format (reads and verifies it) -> order (keyed permutation of samples) -> loader (batches of every rank).
"""
