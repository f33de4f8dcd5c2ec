"""Several processes that hold parts of one model: the collectives between them, and who holds what."""
