"""Convolutions of many channels, by cuDNN on operands that Triton lays out."""
