"""Bricks and the decoder made of them. Nothing here knows about files, data, training or other ranks."""
