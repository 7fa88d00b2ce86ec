"""Experiments that anyone can rerun and that take more than one method: above all of them."""
