"""Models that leave and models that come."""
