"""Context parallelism: the tokens of a row cut over ranks, and how queries meet the keys of the others."""
