"""How a model runs: DeepSpeed and FSDP2, forward and backward passes, fused functions, compiled blocks."""
