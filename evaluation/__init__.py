"""Scores of images: features, metrics of features, references, and the table of results."""
