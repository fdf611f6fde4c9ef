"""The RAM tier's shared memory: the shard's side (`arena`), any process's (`view`), the mapping."""
