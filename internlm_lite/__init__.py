"""internlm_lite: train dense language models in any layout."""

__version__ = "0.1.0"
