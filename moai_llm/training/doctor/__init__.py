"""Checks of a machine, a model and a run, each with a verdict, what was seen and what to do.

Every check is a function that returns a `Finding` and can be called alone; `examine.py` says which belong together.
A check that no broken model can fail is worth nothing: tests/training/test_doctor.py breaks one for each.
"""

from moai_llm.training.doctor.finding import Finding, Verdict, worst

__all__ = ["Finding", "Verdict", "worst"]
