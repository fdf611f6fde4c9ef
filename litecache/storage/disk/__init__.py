"""The disk tier: a private folder with a slab of blocks and what tells where they lie."""
