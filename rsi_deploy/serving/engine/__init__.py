"""Worker processes that run models, and the queues and batches in front of them."""
