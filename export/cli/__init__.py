"""Verbs that make artefacts."""
