"""Inputs and tests that several ops share; each is collected in its op's own folder."""
