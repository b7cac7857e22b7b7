"""Neural models. Flat, with single-dot imports only: these files travel with a checkpoint as its remote code."""
