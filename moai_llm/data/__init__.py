"""From files to batches: sources, the token store, packing, the loader. Needs a tokenizer, knows nothing of models."""
