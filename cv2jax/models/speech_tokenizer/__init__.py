"""The supervised speech tokenizer (S3 v2): Encoder1, FSQ, and the recognition half that trains them."""
