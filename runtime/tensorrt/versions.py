"""What each TensorRT version has: one table, read wherever the adapter takes one of two ways.

A feature is looked up by version, never guessed with `hasattr`: a member may stand in the module and do nothing, as
`NetworkDefinitionCreationFlag.STRONGLY_TYPED` does on 11, and integers of enums were renumbered between 10 and 11.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...errors import InputError


@dataclass(frozen=True, order=True)
class Version:
    """A TensorRT version; the parts that a text leaves out are 0. Ordered as versions are."""

    major: int
    minor: int = 0
    patch: int = 0
    build: int = 0

    @classmethod
    def parse(cls, text: str) -> Version:
        """ "10.3", "10.16.2", "11.4.0.106", also with a suffix such as "10.3.0.dev1"; InputError for anything else."""
        match = re.fullmatch(r"(\d+)\.(\d+)(?:\.(\d+))?(?:\.(\d+))?(?:[.+-]?[a-z].*)?", text.strip())
        if match is None:
            raise InputError(f"TensorRT version {text!r} is not one; write it as 10.3, 10.16.2 or 11.4.0.106")
        return cls(*(int(part or 0) for part in match.groups()))

    def __str__(self) -> str:
        parts = (self.major, self.minor, self.patch, self.build)
        last = 4 if self.build else 3 if self.patch else 2
        return ".".join(str(part) for part in parts[:last])


@dataclass(frozen=True)
class Feature:
    """Something that not every version has.

    `first` has it, `removed` does not any more. `names` are the members of the module that come and go with it,
    as "Class.member" or "Enum.MEMBER"; none where the change is one of behaviour. `source` is where it is told.
    """

    first: str
    removed: str | None = None
    names: tuple[str, ...] = ()
    source: str = ""

    def available(self, version: Version) -> bool:
        """Whether `version` has it."""
        if version < Version.parse(self.first):
            return False
        return self.removed is None or version < Version.parse(self.removed)


OLDEST = "10.3"  # JetPack 6.2; older versions lack functions that have no second way here
# The version that a name is known from where no source tells of the first one: the listing of 10.16.1.
_LISTED = "tensorrt_cu12_bindings 10.16.1.11; the versions between 10.3 and it were not looked at"

FEATURES: dict[str, Feature] = {
    "EDITABLE_TIMING_CACHE": Feature(
        "10.8", names=("BuilderFlag.EDITABLE_TIMING_CACHE",), source="python/src of the 10.8 release"
    ),
    "STRICT_NANS": Feature("10.16", names=("BuilderFlag.STRICT_NANS",), source=_LISTED),
    "MONITOR_MEMORY": Feature("10.16", names=("BuilderFlag.MONITOR_MEMORY",), source=_LISTED),
    "DISTRIBUTIVE_INDEPENDENCE": Feature("10.16", names=("BuilderFlag.DISTRIBUTIVE_INDEPENDENCE",), source=_LISTED),
    "SAME_COMPUTE_CAPABILITY": Feature(
        "10.9",
        names=("HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY",),
        source="python/src of the 10.9 release",
    ),
    "RUNTIME_ACTIVATION_RESIZE": Feature(
        "10.10", names=("PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10",), source="the flag's own name; NvInfer.h"
    ),
    "parser_set_builder_config": Feature(
        "10.15", names=("OnnxParser.set_builder_config",), source="python/src of the 10.15 release"
    ),
    "engine_stat": Feature(
        "10.16", names=("ICudaEngine.get_engine_stat", "EngineStat.TOTAL_WEIGHTS_SIZE"), source=_LISTED
    ),
    "release_refit_resources": Feature(
        "11.4", names=("Refitter.release_refit_resources",), source="tensorrt_cu13_bindings 11.4.0.106, not in 10.16"
    ),
    "inspector_io_tensors": Feature(
        "11.0", source="migration page of 11.0: the inspector's key `Bindings` became `I/O Tensors`"
    ),
    "weak_typing": Feature(
        "10.0",
        removed="11.0",
        names=("BuilderFlag.FP16", "BuilderFlag.INT8", "NetworkDefinitionCreationFlag.EXPLICIT_BATCH"),
        source="migration page of 11.0; the adapter never asks for it, messages name it",
    ),
}

# Flags of the builder that `set_flags` takes, by name: every version has them, or the feature named here says which.
# Precision flags (FP16, INT8, ...) are left out on purpose: precision lives in the graph, see `weak_typing`.
BUILDER_FLAGS: dict[str, str | None] = {
    "DEBUG": None,
    "DIRECT_IO": None,
    "DISABLE_COMPILATION_CACHE": None,
    "DISABLE_TIMING_CACHE": None,
    "DISTRIBUTIVE_INDEPENDENCE": "DISTRIBUTIVE_INDEPENDENCE",
    "EDITABLE_TIMING_CACHE": "EDITABLE_TIMING_CACHE",
    "ERROR_ON_TIMING_CACHE_MISS": None,
    "EXCLUDE_LEAN_RUNTIME": None,
    "GPU_FALLBACK": None,
    "MONITOR_MEMORY": "MONITOR_MEMORY",
    "REFIT": None,
    "REFIT_IDENTICAL": None,
    "REFIT_INDIVIDUAL": None,
    "SPARSE_WEIGHTS": None,
    "STRICT_NANS": "STRICT_NANS",
    "STRIP_PLAN": None,
    "TF32": None,
    "VERSION_COMPATIBLE": None,
    "WEIGHT_STREAMING": None,
}
MEMORY_POOLS: dict[str, str | None] = {"WORKSPACE": None, "TACTIC_DRAM": None, "TACTIC_SHARED_MEMORY": None}
HARDWARE_COMPATIBILITY_LEVELS: dict[str, str | None] = {
    "NONE": None,
    "AMPERE_PLUS": None,
    "SAME_COMPUTE_CAPABILITY": "SAME_COMPUTE_CAPABILITY",
}
PROFILING_VERBOSITIES: dict[str, str | None] = {"NONE": None, "LAYER_NAMES_ONLY": None, "DETAILED": None}
RUNTIME_PLATFORMS: dict[str, str | None] = {"SAME_AS_BUILD": None, "WINDOWS_AMD64": None}
ALLOCATION_STRATEGIES: dict[str, str | None] = {"STATIC": None, "ON_PROFILE_CHANGE": None, "USER_MANAGED": None}
PREVIEW_FEATURES: dict[str, str | None] = {"RUNTIME_ACTIVATION_RESIZE_10_10": "RUNTIME_ACTIVATION_RESIZE"}

# Enum of the module -> the members of it that callers may name.
ENUMS: dict[str, dict[str, str | None]] = {
    "BuilderFlag": BUILDER_FLAGS,
    "MemoryPoolType": MEMORY_POOLS,
    "HardwareCompatibilityLevel": HARDWARE_COMPATIBILITY_LEVELS,
    "ProfilingVerbosity": PROFILING_VERBOSITIES,
    "RuntimePlatform": RUNTIME_PLATFORMS,
    "ExecutionContextAllocationStrategy": ALLOCATION_STRATEGIES,
    "PreviewFeature": PREVIEW_FEATURES,
}


def has(version: Version, feature: str) -> bool:
    """Whether `version` has a feature of `FEATURES`; KeyError for a name that is not in the table."""
    return FEATURES[feature].available(version)


def check_member(version: Version, enum: str, name: str) -> None:
    """InputError unless `name` is a member of `enum` that callers may use and that `version` has."""
    members = ENUMS[enum]
    feature = members.get(name)
    if name in members and (feature is None or has(version, feature)):
        return
    accepted = [key for key, needs in members.items() if needs is None or has(version, needs)]
    why = f"needs TensorRT {FEATURES[feature].first}" if feature else "is not one that can be named here"
    raise InputError(f"{enum} {name!r} {why}; TensorRT {version} takes {', '.join(accepted)}")
