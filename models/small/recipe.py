"""Every number of the small model's recipe, in one frozen record."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ...errors import InputError


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast one stage trains: AdamW, linear warm-up, cosine to zero."""

    steps: int
    batch: int
    learning_rate: float
    weight_decay: float = 0.05
    warmup: float = 0.05

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 2 or not self.learning_rate > 0:
            raise InputError(f"schedule needs steps >= 1, batch >= 2 and a learning rate above 0; got {self}")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Widths and depths. Head width is 32, widths are multiples of 32 (weight-only INT4 blocks)."""

    image: int = 80
    patch: int = 8
    vision_width: int = 96
    vision_layers: int = 4
    queries: int = 16
    qformer_width: int = 96
    qformer_layers: int = 4
    text_width: int = 128
    text_layers: int = 4
    text_heads: int = 4
    text_key_value_heads: int = 2
    contrast_width: int = 64
    head_width: int = 32

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise InputError(f"{field.name} is {getattr(self, field.name)}; it must be at least 1")
        if self.image % self.patch:
            raise InputError(f"image size {self.image} is no multiple of the patch size {self.patch}")

    @property
    def patches(self) -> int:
        return (self.image // self.patch) ** 2


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The whole training run; the same recipe on the same machine gives the same weights."""

    seed: int = 0
    pictures: int = 32_000
    sizes: Sizes = Sizes()
    language: Schedule = Schedule(steps=1500, batch=40, learning_rate=2e-3)
    encoder: Schedule = Schedule(steps=2000, batch=64, learning_rate=1.5e-3)
    stage1: Schedule = Schedule(steps=600, batch=48, learning_rate=1.5e-3)
    stage2: Schedule = Schedule(steps=2000, batch=48, learning_rate=2e-3)

    def __post_init__(self) -> None:
        if self.pictures < 2:
            raise InputError(f"a recipe needs at least 2 pictures, got {self.pictures}")
