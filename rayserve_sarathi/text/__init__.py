"""Text to tokens and back; knows nothing of HTTP, engines or models."""
