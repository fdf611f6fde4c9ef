"""Conversations: replies by the tokenizer's template, and sessions that go on from turn to turn."""
