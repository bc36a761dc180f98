"""The head of a language model: its matrix products, and the walk over the vocabulary."""
