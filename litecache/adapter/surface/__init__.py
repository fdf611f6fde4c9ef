"""What users call: generating, forward passes, the cache, and a model's attributes."""
