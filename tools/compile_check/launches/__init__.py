"""What is launched, by op, at the shapes that matter."""
