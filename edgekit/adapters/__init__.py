"""Adapters as they are trained: which methods there are, and when their projections freeze."""
