"""Training: one loop for pretraining, continued pretraining and fine-tuning. Evaluation and sampling come in as
hooks.
"""
