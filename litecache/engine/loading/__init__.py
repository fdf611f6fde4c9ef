"""From a model's source to a model that is known to be right over paged KV."""
