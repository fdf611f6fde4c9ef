"""What a group does and why, and what is wrong with a machine: for the command line."""
