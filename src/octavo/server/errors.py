"""Errors as OpenAI's API words them, ``{"error": {"message", "type", "param", "code"}}``, or as Anthropic's does.

What a client sees is an `OctavoError`'s cause and remedy, or one of the texts here; never the text of an exception that
nobody expected.
"""

from __future__ import annotations

import msgspec
from starlette.responses import Response

from octavo.errors import ContextExceeded, OctavoError, Overloaded, RequestError
from octavo.log import get_logger

ANTHROPIC_PATHS = "/v1/messages"


class ErrorInfo(msgspec.Struct, frozen=True):
    """OpenAI's error; ``code`` is that of ``docs/errors.md``, or OpenAI's own where it has one."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(msgspec.Struct, frozen=True):
    """What holds it."""

    error: ErrorInfo


class AnthropicError(msgspec.Struct, frozen=True):
    """Anthropic's error."""

    type: str
    message: str


class AnthropicErrorBody(msgspec.Struct, frozen=True, tag_field="type", tag="error"):
    """What holds it, also as an event of a stream."""

    error: AnthropicError
    request_id: str


_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ApiError(RequestError):
    """An error that only the HTTP layer knows. ``code`` is OpenAI's word for it where there is one."""

    def __init__(
        self, status: int, code: str, cause: str, remedy: str = "", *, param: str | None = None, allow: str = ""
    ) -> None:
        """``allow``: the methods of the path, for the header of this name."""
        super().__init__(cause, remedy, param=param, id=code)
        self.status = status
        self.allow = allow


class ClientGone(Exception):
    """The client closed its connection; there is nobody to answer."""


def unknown_model(wanted: str, served: str) -> ApiError:
    """404, as OpenAI answers for a model that does not exist."""
    return ApiError(
        404, "model_not_found", f"the model {wanted!r} does not exist here.", f"Use {served!r}.", param="model"
    )


def bad_key() -> ApiError:
    """401, the same for a key that is missing and one that is wrong."""
    return ApiError(
        401, "invalid_api_key", "the API key is missing or wrong.", "Send it as 'Authorization: Bearer KEY'."
    )


def not_admin(path: str) -> ApiError:
    """403."""
    return ApiError(403, "not_admin", f"{path} is the operator's.", "Use the key of --admin-api-key.")


def too_large(limit: int) -> ApiError:
    """413."""
    return ApiError(413, "body_too_large", f"the body is larger than {limit} bytes.", "Send less at once.")


def too_slow(seconds: float) -> ApiError:
    """408."""
    return ApiError(
        408, "request_timeout", f"nothing more of the body came for {seconds:g} seconds.", "Send the request again."
    )


def no_route(method: str, path: str, allow: str) -> ApiError:
    """405 for a path that is served with other methods, which ``allow`` lists; 404 for one that is not."""
    if allow:
        return ApiError(405, "method_not_allowed", f"{path} does not take {method}.", f"Use {allow}.", allow=allow)
    return ApiError(404, "not_found", f"there is nothing at {path[:200]}.", "GET /docs lists what there is.")


def shutting_down() -> Overloaded:
    """503, while the server ends."""
    return Overloaded("the server is shutting down.", "Send the request to another one.")


def unexpected(request_id: str) -> OctavoError:
    """500 for a bug of ours. To be called where the exception is caught: the log gets it, under the same id."""
    get_logger().exception("request %s failed", request_id)
    return OctavoError(f"the server failed on this request ({request_id}).", "The server's log says why.", id="SRV001")


def body_of(error: OctavoError) -> ErrorBody:
    """The error as a client sees it."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    code = "context_length_exceeded" if isinstance(error, ContextExceeded) else error.id  # OpenAI's word
    return ErrorBody(ErrorInfo(str(error), kind, getattr(error, "param", None), code))


def anthropic_body(error: OctavoError, request_id: str) -> AnthropicErrorBody:
    """The same for Anthropic's clients."""
    default = "invalid_request_error" if error.status < 500 else "api_error"
    kind = _ANTHROPIC_TYPES.get(error.status, default)
    return AnthropicErrorBody(AnthropicError(kind, str(error)), request_id)


def response_of(error: OctavoError, path: str, request_id: str) -> Response:
    """The whole response, in the words of the API at ``path``, for an error that came before any other byte."""
    headers = {}
    if isinstance(error, Overloaded):
        headers["retry-after"] = str(max(1, round(error.retry_after)))
    if error.status in (408, 413):  # the rest of the body is not waited for
        headers["connection"] = "close"
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, ApiError) and error.allow:
        headers["allow"] = error.allow
    anthropic = path.startswith(ANTHROPIC_PATHS)
    body = anthropic_body(error, request_id) if anthropic else body_of(error)
    return Response(msgspec.json.encode(body), error.status, headers, "application/json")
