"""Run folders, networks ready to sample, and weights of other projects."""
