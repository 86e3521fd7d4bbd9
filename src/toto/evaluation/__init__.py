"""Weights -> numbers: what a trained model knows, measured."""
