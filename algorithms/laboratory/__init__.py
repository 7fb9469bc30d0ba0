"""A small language model's whole life, made on the spot: base, aligned, fine-tuned, in an invented language."""

from algorithms.laboratory.laboratory import DimensionFiles, Laboratory, Recipe, build, read_examples
from algorithms.laboratory.language import Example

__all__ = ["DimensionFiles", "Example", "Laboratory", "Recipe", "build", "read_examples"]
