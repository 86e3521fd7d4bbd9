"""Sequences -> logits and features. This room sees token ids alone, so any tokenizer can feed it.

Dimension letters, here and in every room above:

    B batch    S sequence    T frames    H rows    W columns
    D width    N heads       K head size V vocabulary
"""
