"""A bundle held against PyTorch, stage by stage. Needs torch and transformers, unlike the rest of the run
time.
"""

from .check import check_parity
from .drill import DrillReport
from .html import write_html
from .report import ParityReport

__all__ = ["DrillReport", "ParityReport", "check_parity", "write_html"]
