"""internlm_lite: train dense language models in any layout."""
