"""Maps of the attention of a model: which token looks at which."""
