"""Weights to and from the folders of Hugging Face transformers."""
