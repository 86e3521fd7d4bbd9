"""Logits -> codes -> pixels, from a trained model."""
