"""Every error that this package raises on purpose, named after who must act.

SarathiError
|-- ConfigError             the operator: a setting is wrong
|-- InvalidRequestError     the client: the request can never be served as it stands
|   `-- ContextLengthError  ... because it is longer than the model's context
|-- OverloadedError         the client, later: the queue is full
|-- EngineDeadError         the operator: a pipeline or a scheduler is gone
|   `-- PipelineFaultError  nobody yet: a pipeline has failed and can be rebuilt
`-- WireError               whoever owns the connection: close it, what came over it is no message of ours
"""

from collections.abc import Collection


class SarathiError(Exception):
    """Base of all errors of this package."""


class ConfigError(SarathiError):
    """A setting is missing, malformed or impossible on this machine."""


class InvalidRequestError(SarathiError):
    """A request can never be served as it stands.

    Args:
        message: What is wrong, what was given, what would do.
        param: Path of the offending field as the client wrote it, such as `messages.0.role`.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def __reduce__(self) -> tuple[object, ...]:
        # Ray pickles errors by class and args alone, which would lose `param`.
        return (_restore_invalid_request, (type(self), self.message, self.param))


class ContextLengthError(InvalidRequestError):
    """Prompt and max_tokens do not fit into the model's context."""


class OverloadedError(SarathiError):
    """The engine refuses work that it could not start soon.

    Args:
        message: What is full, and how full.
        retry_after_s: When to come back, in seconds.
    """

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[object, ...]:
        return (_restore_overloaded, (self.message, self.retry_after_s))


class EngineDeadError(SarathiError):
    """A pipeline or a scheduler is gone, or has not started yet."""


class PipelineFaultError(EngineDeadError):
    """A pipeline has failed; whoever owns it may rebuild it.

    Args:
        message: What happened, and to which stage.
        reason: `died`, `hung`, `failed` (raised on every step) or `lost_message`: the label of a metric.
        stages: Stages that are known to be broken, though they may answer.
    """

    def __init__(self, message: str, *, reason: str, stages: Collection[int] = ()) -> None:
        super().__init__(message)
        self.reason = reason
        self.stages = frozenset(stages)

    def __reduce__(self) -> tuple[object, ...]:
        return (_restore_pipeline_fault, (str(self), self.reason, tuple(self.stages)))


class WireError(SarathiError):
    """Bytes from another process are no message, or a message cannot be sent."""


def _restore_invalid_request(cls: type[InvalidRequestError], message: str, param: str | None) -> InvalidRequestError:
    return cls(message, param=param)


def _restore_overloaded(message: str, retry_after_s: float) -> OverloadedError:
    return OverloadedError(message, retry_after_s=retry_after_s)


def _restore_pipeline_fault(message: str, reason: str, stages: Collection[int]) -> PipelineFaultError:
    return PipelineFaultError(message, reason=reason, stages=stages)
