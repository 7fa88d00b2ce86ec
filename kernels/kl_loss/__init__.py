"""Losses over the vocabulary: cross-entropy and distillation."""
