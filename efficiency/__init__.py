"""Efficiency methods that apply to any network."""
