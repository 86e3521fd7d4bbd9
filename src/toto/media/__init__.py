"""Files -> pixels: listing, decoding, sampling, resizing, and the ledger of what became of every input."""
