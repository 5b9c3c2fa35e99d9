"""Adapters: read, scaled and written on ordinary diffusers pipelines."""
