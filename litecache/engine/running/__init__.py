"""From a step's plan to its tokens: batches, graphs, the model's passes, drawing."""
