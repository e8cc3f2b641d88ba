"""Scores of content and style on generated pictures."""
