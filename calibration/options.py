"""What `quantize` can be asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import InputError
from .observers.settings import OBSERVERS

# Fewer pictures than this leave nothing to judge with; NVIDIA and others advise hundreds for a vision encoder.
MIN_PICTURES = 8
ENGINES = ("onnxruntime", "openvino")
WEIGHTS = ("rtn", "gptq")


@dataclass(frozen=True)
class QuantizeOptions:
    """What is wanted of the bundle.

    `precision`, `target`: for the whole of it; `stages`: stage -> its own precision. `observer`: what chooses ranges.
    `engine`: what runs the stages that see pictures, of a bundle for the CPU. `weights`: how 4-bit weights are rounded,
    "rtn" (to nearest) or "gptq". `samples`: most pictures, for calibration and judgement together. `auto`: mixed
    precision by sensitivity. `cache`: where observed activations are kept, None for the user's cache directory.
    `report`: where the search's tables and pictures go, `save_inputs`: the `.npz` file that keeps the encoder's inputs,
    None for nowhere.
    """

    precision: str
    target: str = "cpu"
    stages: Mapping[str, str] = field(default_factory=dict)
    observer: str = "mse"
    engine: str = "onnxruntime"
    weights: str = "rtn"
    samples: int = 128
    seed: int = 0
    auto: bool = False
    cache: Path | None = None
    report: Path | None = None
    save_inputs: Path | None = None

    def __post_init__(self) -> None:
        for option, got, accepted in (
            ("observer", self.observer, OBSERVERS),
            ("engine", self.engine, ENGINES),
            ("weights", self.weights, WEIGHTS),
        ):
            if got not in accepted:
                raise InputError(f"--{option} {got!r} is unknown; accepted are {', '.join(accepted)}")
        if self.engine != "onnxruntime" and self.target != "cpu":
            raise InputError(f"--engine {self.engine} runs on the CPU; leave it out for target {self.target}")
        if self.samples < MIN_PICTURES:
            raise InputError(f"--samples {self.samples} is too few; accepted is {MIN_PICTURES} or more")
