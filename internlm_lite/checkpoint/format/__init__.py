"""The format of a checkpoint: regions, tensor files, manifest, and the catalog of a folder."""
