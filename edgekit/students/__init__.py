"""Trained students that ship with edgekit, one directory each."""
