"""Names of 0.5, for scripts that import them; what they were is in `lora` and `live` now."""
