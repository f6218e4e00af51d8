"""From texts to results.json and the reports."""
