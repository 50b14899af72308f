"""The ground both jobs stand on: it knows no model, no mask and no class."""
