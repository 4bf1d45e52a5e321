"""hashray: from an image corpus to a searchable, sharded index of learned binary codes."""

__version__ = "0.1.0"
