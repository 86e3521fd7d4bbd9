"""Pixels <-> codes <-> sequences.

Dimension letters: T frames, H and W pixels, rows and cols cells of the token grid, B batch, S sequence.
"""
