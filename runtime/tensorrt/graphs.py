"""A run of an engine as a CUDA graph: captured after one normal run, replayed while nothing about it changes.

One graph for one context, since TensorRT leaves it undefined what a captured graph does once its context is set up
anew: another shape, profile or address drops it, and it is captured again after one more normal run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from ...errors import EngineError
from .memory import Cuda

logger = logging.getLogger(__name__)


class GraphRun:
    """What enqueues a context on `stream`. `wanted`: False for what cannot be captured (weight streaming)."""

    def __init__(self, cuda: Cuda, stream: int, stage: str, *, wanted: bool = True) -> None:
        self._cuda, self._stream, self._stage = cuda, stream, stage
        self._wanted = wanted
        self._graph: int | None = None
        self._ran = False

    @property
    def captured(self) -> bool:
        """Whether the next run replays a graph."""
        return self._graph is not None

    def drop(self) -> None:
        """The context changed: the graph is of no use any more."""
        graph, self._graph, self._ran = self._graph, None, False
        if graph is not None:
            self._cuda.synchronize(self._stream)  # it may still run
            self._cuda.destroy_graph(graph)

    def run(self, enqueue: Callable[[], None], *, capturable: bool = True) -> None:
        """Enqueue the context, by `enqueue` or as a graph. `capturable`: False for a shape that depends on data."""
        if self._graph is None and self._ran and self._wanted and capturable:
            self._graph = self._capture(enqueue)
        if self._graph is not None:
            self._cuda.launch_graph(self._graph, self._stream)
            return
        enqueue()
        self._ran = True

    def _capture(self, enqueue: Callable[[], None]) -> int | None:
        """None, for good, for an engine that cannot be captured (it has control flow, or copies to the host)."""
        self._cuda.begin_capture(self._stream)
        try:
            enqueue()
        except EngineError as error:
            self._cuda.abandon_capture(self._stream)
            self._give_up(error)
            return None
        except BaseException:
            self._cuda.abandon_capture(self._stream)
            raise
        try:
            return self._cuda.end_capture(self._stream)
        except EngineError as error:
            self._give_up(error)
            return None

    def _give_up(self, error: EngineError) -> None:
        self._wanted = False
        logger.info("%s runs without a CUDA graph: %s", self._stage, error)
