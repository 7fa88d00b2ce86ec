"""Stage-1 loss: how far a mixer's output is from the teacher's."""
