"""InfoNCE over ranks: `rows` and `columns` are what a loss calls; `remote` and `label_means` are parts of `rows`."""
