"""Versions of the schema, oldest first: four digits that sort as text."""
