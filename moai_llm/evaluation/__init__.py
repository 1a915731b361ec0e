"""Measuring a model: reads model directories, never trains."""
