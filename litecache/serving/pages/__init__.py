"""What the server answers without its model: a page for people, the schemas of bodies, metrics."""
