"""Tokenised files, tokenizers, and the batches made from them."""
