"""A report on training runs: what their folders hold (`record.py`), as plots (`charts.py`), as one page (`page.py`)."""
