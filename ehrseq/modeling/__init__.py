"""Neural models. Flat, with single-dot imports only: these files travel with a checkpoint as its remote code."""

# Before any part of it, which the files import: a thread that imports `transformers.utils` locks that part first and
# then waits for transformers, whose own import in another thread waits for that part.
import transformers  # noqa: F401
