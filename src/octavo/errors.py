"""Every error a person or a client can see.

    OctavoError
    ├── RequestError      this request is wrong; the next one works       HTTP 400
    │   └── ContextExceeded
    ├── Overloaded        try again later                                  HTTP 503
    ├── ConfigError       an option of the engine is wrong                 exit code 2
    ├── ModelError        between a model's name and a ready model         exit code 3
    │   └── UnsupportedModel
    ├── OutOfMemory       weights or one request's pages do not fit        exit code 4
    └── EngineDead        the engine process ended; nothing can be served  HTTP 500

A message has a cause (what, value, limit) and a remedy; ``id`` names it in the catalogue of ``docs/errors.md``.
"""

from __future__ import annotations


class OctavoError(Exception):
    """Base of all errors raised on purpose.

    ``cause`` says what is wrong with the value and the limit, ``remedy`` what to do about it;
    both are one line. ``id`` is stable and is what tests and clients match on.
    """

    id = "OCT000"
    status = 500
    exit_code = 1

    def __init__(self, cause: str, remedy: str = "", *, id: str | None = None) -> None:
        super().__init__(cause, remedy)
        self.cause = cause
        self.remedy = remedy
        if id is not None:
            self.id = id

    def __str__(self) -> str:
        return f"{self.cause} {self.remedy}".rstrip()


class RequestError(OctavoError):
    """A request that cannot be served as it stands. ``param`` is the field at fault, if there is one."""

    id = "REQ001"
    status = 400

    def __init__(self, cause: str, remedy: str = "", *, param: str | None = None, id: str | None = None) -> None:
        super().__init__(cause, remedy, id=id)
        self.param = param


class ContextExceeded(RequestError):
    """A prompt that does not fit into max_model_len, or not together with the answer that is asked for."""


class Overloaded(OctavoError):
    """The queue is full or the engine is shutting down. ``retry_after`` is in seconds."""

    id = "REQ503"
    status = 503

    def __init__(self, cause: str, remedy: str = "Retry later.", *, retry_after: float = 1.0) -> None:
        super().__init__(cause, remedy)
        self.retry_after = retry_after


class ConfigError(OctavoError):
    """An option of the engine that is malformed, out of range or at odds with another one."""

    id = "CFG001"
    exit_code = 2


class ModelError(OctavoError):
    """A model that cannot be found, read or built."""

    id = "HF000"
    exit_code = 3


class UnsupportedModel(ModelError):
    """An architecture that nothing here can run; the cause lists what was tried."""

    id = "HF030"


class OutOfMemory(OctavoError):
    """Weights, or the KV pages that one request needs, do not fit into the memory allowed."""

    id = "MEM001"
    exit_code = 4


class EngineDead(OctavoError):
    """The engine ended. Pending requests get this error; the process that sees it should exit."""

    id = "ENG001"


def retold(kind: str, cause: str, remedy: str = "", id: str = "") -> OctavoError:
    """An error of another process, as the class that is named ``kind`` again."""
    error = _CLASSES.get(kind, EngineDead)(cause, remedy)
    if id:
        error.id = id
    return error


_CLASSES = {
    cls.__name__: cls for cls in list(vars().values()) if isinstance(cls, type) and issubclass(cls, OctavoError)
}
