"""Attention that also says how much of it each head gives to the image."""
