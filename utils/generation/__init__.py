"""Summaries: each distinct prompt once, decoded without texts that have ended, finished batches kept."""
