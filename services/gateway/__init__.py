"""The gateway: an OpenAI-compatible HTTP API on the same topics."""
