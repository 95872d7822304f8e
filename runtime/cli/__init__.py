"""Verbs that run artefacts."""
