"""An app that is not this package's."""
