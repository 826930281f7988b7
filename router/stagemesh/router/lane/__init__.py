"""A lane: a chain of stages, formed, watched, driven by a scheduler, and formed again when it breaks."""
