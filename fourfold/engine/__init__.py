"""The engine: scheduling, batches, the step loop. Above the model, below every front."""
