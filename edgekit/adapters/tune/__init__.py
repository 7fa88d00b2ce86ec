"""Tune adapters: a model and examples in, a PEFT adapter and a record of its training out."""
