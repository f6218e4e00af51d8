"""Numbers about texts: ROUGE and BERTScore with their intervals, and what the texts are like."""
