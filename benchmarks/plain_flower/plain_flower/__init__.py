"""A plain Flower app that fine-tunes a network with PEFT."""
