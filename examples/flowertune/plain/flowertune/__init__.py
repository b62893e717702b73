"""A small language model, tuned on instructions by FedAvg over its LoRA adapters."""
