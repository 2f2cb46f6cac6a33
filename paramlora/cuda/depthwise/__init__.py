"""Convolutions of single channels."""
