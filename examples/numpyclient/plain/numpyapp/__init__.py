"""A NumPyClient project: a multilayer perceptron on handwritten digits, trained by FedAvg."""
