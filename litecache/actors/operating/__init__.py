"""What whoever operates a group does with it: start it from a file, scale, drain and watch it."""
