"""Models: load and check them, LoRA, what DeepSpeed and FSDP2 do otherwise, the export."""
