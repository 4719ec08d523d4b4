"""Eager calls past torch's dispatcher."""
