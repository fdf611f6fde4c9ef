"""What lies below the pool: the shards of the node, and the threads that copy there and back."""
