"""Hugging Face models: their configs, tokenizers and batches, and the step that everything else repeats or fakes.

The only room that imports transformers.
"""
