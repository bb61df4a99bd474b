"""Splitting one model over ranks: the communication it needs, and every parameter's rule."""
