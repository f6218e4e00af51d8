"""From texts to ROUGE, results.json and the reports."""
