"""Code that both jobs share; it knows nothing of models, masks or classes."""
