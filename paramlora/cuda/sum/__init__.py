"""Weights with a low-rank update added."""
