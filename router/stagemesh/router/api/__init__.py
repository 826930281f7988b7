"""The public side: requests checked and tokenized, tokens detokenized and streamed, and the admin service."""
