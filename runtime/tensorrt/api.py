"""The adapter: the only place that touches the module `tensorrt`, one code path from 10.3 to 11.4.

::

    api = load_api()
    builder = api.create_builder()
    network = api.create_strongly_typed_network(builder)
    config = api.create_config(builder)
    api.parse_onnx(api.create_parser(network, config), Path("encoder.onnx"))
    api.set_tf32(config, False)
    api.add_profile(builder, config, {"pixel_values": ((1, 3, 224, 224), (4, 3, 224, 224), (8, 3, 224, 224))})
    plan = api.build_serialized(builder, network, config)

    context = api.create_context(api.deserialize(api.create_runtime(), plan))
    api.set_profile(context, 0, stream)
    api.set_input_shape(context, "pixel_values", (2, 3, 224, 224))
    api.set_address(context, "pixel_values", pointer)  # and every other input and output
    api.execute(context, stream)

A test proves every name and argument used here against listings of the genuine modules of 10.3, 10.16 and 11.4.
"""

from __future__ import annotations

from importlib import import_module

from ...errors import DependencyError
from .api_base import DTYPE_NAMES, MessageLog, TensorInfo
from .api_build import BuildApi, BuildProgress, ParseFailure
from .api_run import OutputMemory, RunApi
from .versions import OLDEST, Version

__all__ = [
    "DTYPE_NAMES",
    "Api",
    "BuildProgress",
    "MessageLog",
    "OutputMemory",
    "ParseFailure",
    "TensorInfo",
    "load_api",
]

_HOW = (
    "on a Jetson it comes with JetPack (apt install python3-libnvinfer, and a virtual environment made with "
    "--system-site-packages); elsewhere `pip install tensorrt`"
)


class Api(BuildApi, RunApi):
    """All calls into TensorRT. `version` is the module's; `has(feature)` reads `versions.FEATURES`."""


def load_api(log: MessageLog | None = None) -> Api:
    """The adapter over the installed module. DependencyError where it is missing, broken or older than 10.3."""
    try:
        module = import_module("tensorrt")
    except ModuleNotFoundError as error:
        raise DependencyError(f"TensorRT's Python module is not installed; {_HOW}") from error
    except (ImportError, OSError) as error:  # found, but a library of it is not
        raise DependencyError(f"TensorRT's Python module does not load ({error}); {_HOW}") from error
    told = getattr(module, "__version__", None)
    if told is None:  # a folder of this name, from which Python makes an empty module
        places = ", ".join(getattr(module, "__path__", [])) or str(getattr(module, "__file__", "it"))
        raise DependencyError(f"the module `tensorrt` that Python finds ({places}) is not NVIDIA's; {_HOW}")
    version = Version.parse(told)
    if version < Version.parse(OLDEST):
        raise DependencyError(f"TensorRT {version} is installed, {OLDEST} or newer is needed; {_HOW}")
    return Api(module, version, log)
