"""Training of the embedded model on procedural pictures, and of multi-stage style embeddings."""
