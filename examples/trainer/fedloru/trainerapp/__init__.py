"""A vision transformer on handwritten digits, trained by the Trainer of transformers on each client."""
