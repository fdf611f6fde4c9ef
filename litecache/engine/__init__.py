"""What runs inside the GpuCache actor, as plain classes without Ray."""
