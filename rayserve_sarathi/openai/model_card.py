"""What clients are told about the model that is served."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """The one model behind this API."""

    name: str
    """What clients call it."""
    root: str
    """The checkpoint's local folder or hub id, from which a client can load the tokenizer."""
    max_model_len: int
    """Most tokens of a request, prompt and output."""
    vocab_size: int
    """Size of the model's embedding; token ids must be less."""
    created: int
    """When serving began, in Unix seconds."""
    eos_token_ids: frozenset[int] = frozenset()
    """Tokens that end a request."""

    def describe(self) -> dict[str, object]:
        """Return the entry of `/v1/models`."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "rayserve_sarathi",
            "root": self.root,
            "parent": None,
            "max_model_len": self.max_model_len,
        }
