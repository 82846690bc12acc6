"""Trained weights that come with the toolkit, and how they are found by name."""
