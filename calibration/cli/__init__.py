"""Verbs that quantise."""
