"""Models in the formats of others, and models of others in ours. Whatever is written is read back and compared."""
