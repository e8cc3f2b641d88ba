"""Requests to samples, groups of samples, and the rows of a group."""
