"""What is trained: one model with its loss, batches and scores, its trainable parameters one flat vector."""
