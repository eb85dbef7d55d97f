"""The first minutes on a GPU: is it right, does it hang, how fast is it."""
