"""Weights of other projects: their files, the names of their tensors, and their layouts, to read and to write."""
