"""Tasks, readers, phantoms, the slice store, splits and transforms."""
