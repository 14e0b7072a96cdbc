"""The decoder inside other libraries' calls."""
