"""Models: load and check them, LoRA, the export."""
