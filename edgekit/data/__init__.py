"""Text, conversations and needles: what models are trained on and measured with."""
