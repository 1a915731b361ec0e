"""Side-by-side measurements: ours and the alternatives in one process, in turn, medians; refused where results
disagree.
"""
