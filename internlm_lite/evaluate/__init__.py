"""Tasks scored on a model: what is asked in text, as token ids, as forward passes on all ranks."""
