"""A sweep over the model types of the installed transformers."""
