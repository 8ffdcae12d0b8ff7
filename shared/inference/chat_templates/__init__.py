"""Chat templates of common model families, as Jinja files in Hugging Face's `chat_template` conventions."""
