"""What a run needs, known before it starts: memory, the micro-batch that fits, --preflight."""
