"""Converts weights to and from folders of Hugging Face transformers."""
