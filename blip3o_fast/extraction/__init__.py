"""From images to paired embeddings."""
