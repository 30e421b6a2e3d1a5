"""Lifting: on a copy of the user's module, all that carries a state takes it from the state row and leaves it there."""
