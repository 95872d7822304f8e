"""The language model's decoder: one record for each kind of text model says who builds its graph."""

from .export import LlmGraph, export_llm, scratch_bytes

__all__ = ["LlmGraph", "export_llm", "scratch_bytes"]
