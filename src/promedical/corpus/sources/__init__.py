"""Readers of public datasets, one module a dataset: their rows become graded instructions."""
