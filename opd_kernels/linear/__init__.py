"""The differentiable operators of a head: the walk over the vocabulary and its matrix products."""
