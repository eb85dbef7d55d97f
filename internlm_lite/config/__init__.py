"""Config files: the schema, running the Python file, cross checks."""
