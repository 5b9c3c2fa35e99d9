"""`parse_prompt` by its name of 0.5."""

from lorabook.live.prompt_syntax import parse_prompt

__all__ = ["parse_prompt"]
