"""Reports as HTML pages: one file each, no script, nothing fetched; drawn by hand, light and dark, for a phone too.

What is shown belongs to the rooms that know it; here are the frame of a page, its tables and its plots.
"""
