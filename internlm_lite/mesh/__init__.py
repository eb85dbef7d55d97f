"""Named process groups, collectives on them, and which part of a whole tensor a rank holds."""
