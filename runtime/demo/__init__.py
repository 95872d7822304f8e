"""The main job end to end on the small trained model: export, quantise, run, prove, score."""

from __future__ import annotations

from .job import Answered, DemoReport, Score, run_demo

__all__ = ["Answered", "DemoReport", "Score", "run_demo"]
