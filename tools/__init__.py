"""What the project's own figures are made with; run as `python -m tools.benchmark`."""
