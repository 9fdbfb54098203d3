"""From a folder to a batch: dataset files, sources, sizes, caches, items, batches."""
