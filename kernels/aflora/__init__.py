"""AFLoRA's side path: the plain form, and one that keeps little for the backward pass."""
